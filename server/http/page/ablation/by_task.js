// A comparison task by task, with p adjusted for their number.

import { html } from "../html.js";
import { percent, points, pValue } from "../number.js";
import { Scroll } from "../scroll.js";

/** The table; nothing for a set of one task, which would say the same again. */
export function ByTask({ comparison, variants }) {
  const rows = Object.entries(comparison.by_task ?? {});
  if (rows.length < 2) return null;
  const { a, b } = comparison;
  return html`
    <h4>By task</h4>
    <${Scroll} label="Comparison by task">
      <table class="by-task">
        <thead><tr>
          <th scope="col">Task</th><th scope="col" class="number">${a}</th>
          <th scope="col" class="number">${b}</th><th scope="col" class="number">Points</th>
          <th scope="col" class="number">Gained</th><th scope="col" class="number">Lost</th>
          <th scope="col" class="number">p</th><th scope="col" class="number">p, Holm</th>
        </tr></thead>
        <tbody>
          ${rows.map(
            ([task, row]) => html`
            <tr>
              <th scope="row">${task}</th>
              <td class="number">${percent(variants[a].by_task[task].accuracy)}</td>
              <td class="number">${percent(variants[b].by_task[task].accuracy)}</td>
              <td class="number">${points(row.difference)}</td>
              <td class="number">${row.mcnemar.gained}</td>
              <td class="number">${row.mcnemar.lost}</td>
              <td class="number">${pValue(row.mcnemar.p)}</td>
              <td class="number">${pValue(row.mcnemar.p_holm)}</td>
            </tr>
          `,
          )}
        </tbody>
      </table>
    <//>
    <p class="hint">With ${rows.length} tasks, one of them may look different by chance. Holm's p allows for
      that: 0.05 or less in any row is hardly chance.</p>
  `;
}
