// The background ablations of the key, the newest first.

import { html } from "../html.js";
import { when } from "../number.js";
import { Problem } from "../problem.js";
import { Scroll } from "../scroll.js";
import { titleOf } from "./run.js";

/** `runs` is what GET /ablation lists. */
export function PastRuns({ runs, error }) {
  return html`
    <section class="card" aria-labelledby="past-heading">
      <h3 id="past-heading">Past runs</h3>
      <${Problem} error=${error} />
      ${runs?.length === 0 &&
      html`<p class="hint">None yet. A run stays here until the server deletes it.</p>`}
      ${
        runs?.length > 0 &&
        html`
        <${Scroll} label="Past runs"><table>
          <thead><tr><th scope="col">Run</th><th scope="col">Variants</th>
            <th scope="col">Status</th><th scope="col" class="number">Done</th></tr></thead>
          <tbody>
            ${runs.map(
              (run) => html`
              <tr>
                <td><a href="#/ablation/${run.id}">${titleOf(run.settings)}</a>
                  <div class="hint">${when(run.created)}</div></td>
                <td>${(run.settings.variants ?? []).join(", ")}</td>
                <td><span class="badge ${run.status}">${run.status}</span></td>
                <td class="number">${run.progress.done} of ${run.progress.total}</td>
              </tr>
            `,
            )}
          </tbody>
        </table><//>
      `
      }
    </section>
  `;
}
