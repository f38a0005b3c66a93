// The result of an ablation. What flipped comes first: it says what a difference is made of.

import { useState } from "preact/hooks";

import { html } from "../html.js";
import { useResource } from "../resource.js";
import { ByTask } from "./by_task.js";
import { FlipTable } from "./flips.js";
import { Items } from "./items.js";
import { questionTexts } from "./question_texts.js";
import { VariantTable } from "./variants.js";
import { comparisonInWords, perplexityInWords } from "./words.js";

const MARGIN = 0.02; // the server's default

/** `request` is what was asked, `result` what came of it. */
export function Report({ request, result }) {
  const { comparisons, variants, items } = result;
  const [index, setIndex] = useState(0);
  const [kind, setKind] = useState(null);
  const questions = useResource((signal) => questionTexts(request, result, signal), [result.id]);
  const comparison = comparisons[index];
  return html`
    ${
      comparison &&
      html`
      <section class="card" aria-labelledby="comparison-heading">
        <div class="row spread">
          <h3 id="comparison-heading">${comparison.a} against ${comparison.b}</h3>
          ${
            comparisons.length > 1 &&
            html`
            <label class="reference">Compare
              <select value=${index} onChange=${(event) => setIndex(Number(event.target.value))}>
                ${comparisons.map(({ a, b }, i) => html`<option value=${i}>${a} against ${b}</option>`)}
              </select>
            </label>
          `
          }
        </div>
        <${Comparison} comparison=${comparison} margin=${request.margin ?? MARGIN} kind=${kind}
          onKind=${setKind} />
        <${ByTask} comparison=${comparison} variants=${variants} />
      </section>
    `
    }
    <section class="card" aria-labelledby="variants-heading">
      <h3 id="variants-heading">Variants</h3>
      <${VariantTable} variants=${variants} />
    </section>
    <div class="card">
      <${Items} items=${items} comparison=${comparison} questions=${questions.value ?? new Map()}
        kind=${kind} onKind=${setKind} />
    </div>
  `;
}

function Comparison({ comparison, margin, kind, onKind }) {
  const isJudged = Boolean(comparison.table);
  const said = isJudged ? comparisonInWords(comparison, margin) : perplexityInWords(comparison);
  return html`
    <div class="comparison">
      ${isJudged && html`<${FlipTable} comparison=${comparison} picked=${kind} onPick=${onKind} />`}
      <div class="words">${said.map((each) => html`<p>${each}</p>`)}</div>
    </div>
  `;
}
