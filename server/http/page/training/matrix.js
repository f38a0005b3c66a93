// A matrix of a run: a row for the base model and one after each stage, a column for each task.

import { html } from "../html.js";
import { Scroll } from "../scroll.js";

const STRONGEST = 40; // percent of the colour: texts stay readable on it

/** `rows` [N + 1][T], null where nothing was measured; `show` writes a value, `shade(value)` is from 0 to 1. */
export function Matrix({ title, tasks, rows, show, shade }) {
  const stageOf = (index) =>
    index === 0 ? "base model" : `after ${tasks[index - 1] ?? `stage ${index}`}`;
  return html`
    <figure class="matrix">
      <figcaption><h4>${title}</h4></figcaption>
      <${Scroll} label=${title}>
        <table>
          <thead><tr>
            <td></td>
            ${tasks.map((task) => html`<th scope="col" class="number">${task}</th>`)}
          </tr></thead>
          <tbody>
            ${rows.map(
              (row, index) => html`
              <tr>
                <th scope="row">${stageOf(index)}</th>
                ${row.map(
                  (value, t) => html`
                  <td class="number ${t === index - 1 ? "learned" : ""}"
                    style=${{ background: tint(value == null ? 0 : shade(value)) }}>${value == null ? "–" : show(value)}</td>
                `,
                )}
              </tr>
            `,
            )}
          </tbody>
        </table>
      <//>
    </figure>
  `;
}

function tint(share) {
  const strength = Math.round(Math.max(0, Math.min(1, share)) * STRONGEST);
  return `color-mix(in srgb, var(--crma) ${strength}%, transparent)`;
}
