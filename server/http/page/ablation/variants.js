// Each variant's share of right answers, over all questions and by task.

import { html } from "../html.js";
import { fixed, percent } from "../number.js";
import { Scroll } from "../scroll.js";
import { Bar } from "./bar.js";

/** The table of all questions. */
export function VariantTable({ variants }) {
  const rows = Object.entries(variants);
  if ("perplexity" in rows[0][1]) return html`<${PerplexityTable} rows=${rows} />`;
  return html`
    <${Scroll} label="Variants">
      <table class="variants">
        <thead><tr>
          <th scope="col">Variant</th><th scope="col" class="wide">Right, with its 95 % interval</th>
          <th scope="col" class="number">Right</th><th scope="col" class="number">Interval</th>
          <th scope="col" class="number">Questions</th>
        </tr></thead>
        <tbody>
          ${rows.map(
            ([name, row]) => html`
            <tr data-variant=${name}>
              <th scope="row"><span class="swatch" aria-hidden="true"></span>${name}</th>
              <td class="wide"><${Bar} share=${row.accuracy} interval=${row.wilson} /></td>
              <td class="number accuracy">${percent(row.accuracy, 1)}</td>
              <td class="number">${intervalInWords(row.wilson)}</td>
              <td class="number">${row.correct} of ${row.scored}${unscored(row)}</td>
            </tr>
          `,
          )}
        </tbody>
      </table>
    <//>
  `;
}

function unscored({ failed, timed_out: late }) {
  const told = [failed && `${failed} failed`, late && `${late} timed out`].filter(Boolean);
  return told.length ? `, ${told.join(", ")}` : "";
}

function intervalInWords(wilson) {
  return wilson ? `${fixed(wilson[0] * 100, 1)} to ${fixed(wilson[1] * 100, 1)}` : "–";
}

function PerplexityTable({ rows }) {
  return html`
    <${Scroll} label="Variants">
      <table class="variants">
        <thead><tr>
          <th scope="col">Variant</th><th scope="col" class="number">Perplexity</th>
          <th scope="col" class="number">Nats a token</th><th scope="col" class="number">Scored</th>
        </tr></thead>
        <tbody>
          ${rows.map(
            ([name, row]) => html`
            <tr data-variant=${name}>
              <th scope="row"><span class="swatch" aria-hidden="true"></span>${name}</th>
              <td class="number">${row.perplexity == null ? "–" : fixed(row.perplexity, 3)}</td>
              <td class="number">${row.logprob_per_token == null ? "–" : fixed(row.logprob_per_token, 4)}</td>
              <td class="number">${row.scored}${unscored(row)}</td>
            </tr>
          `,
          )}
        </tbody>
      </table>
    <//>
  `;
}
