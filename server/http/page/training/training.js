// The tab Training: the records of runs, and how what serves was trained.

import { get } from "../api.js";
import { html } from "../html.js";
import { fixed, percent, short } from "../number.js";
import { Problem } from "../problem.js";
import { useResource } from "../resource.js";
import { Scroll } from "../scroll.js";
import { Run } from "./run.js";

/** The tab; `argument` is the id of a run, or "": the first that tells something. */
export function Training({ argument, adapters }) {
  const runs = useResource((signal) => get("runs", signal));
  const listed = runs.value ?? [];
  const id = argument || (listed.find(isTelling) ?? listed[0])?.id;
  return html`
    <h2>Training</h2>
    <${Problem} error=${runs.error} />
    ${runs.value && !listed.length && html`<p class="hint">This server has no records of runs.</p>`}
    <div class="training">
      <div>
        <section class="card" aria-labelledby="runs-heading">
          <h3 id="runs-heading">Runs</h3>
          <${Scroll} label="Runs" className="runs"><table>
            <thead><tr><th scope="col">Run</th><th scope="col" class="number">ACC</th>
              <th scope="col" class="number">Drift %</th></tr></thead>
            <tbody>
              ${listed.map(
                (run) => html`
                <tr>
                  <td><a href="#/training/${run.id}"
                    aria-current=${run.id === id ? "true" : null}>${run.id}</a></td>
                  <td class="number">${percent(run.ACC, 1)}</td>
                  <td class="number">${run.mean_drift == null ? "–" : fixed(run.mean_drift, 2)}</td></tr>
              `,
              )}
            </tbody>
          </table><//>
        </section>
        <${Serving} tasks=${adapters.value?.tasks ?? []} />
      </div>
      <div>${id && html`<${Run} id=${id} />`}</div>
    </div>
  `;
}

/** A run that shows all of what the tab has: it was measured, and something drifted. */
function isTelling({ ACC: accuracy, mean_drift: drift }) {
  return accuracy != null && Boolean(drift);
}

/** How the serving version of each task was trained, from its manifest. */
function Serving({ tasks }) {
  const names = tasks.map((task) => task.name);
  const found = useResource(
    (signal) =>
      Promise.all(names.map((name) => get(`adapters/${encodeURIComponent(name)}`, signal))),
    [names.join()],
  );
  return html`
    <section class="card" aria-labelledby="serving-heading">
      <h3 id="serving-heading">What serves was trained as</h3>
      <${Problem} error=${found.error} />
      ${names.length === 0 && html`<p class="hint">No task serves.</p>`}
      <${Scroll} label="What serves"><table>
        <thead><tr><th scope="col">Task</th><th scope="col">Arm</th><th scope="col" class="number">Seed</th>
          <th scope="col">Commit</th><th scope="col">Backbone</th></tr></thead>
        <tbody>${(found.value ?? []).map(servingRow)}</tbody>
      </table><//>
    </section>
  `;
}

function servingRow({ name, versions }) {
  const version = versions.find((each) => each.serves);
  const trained = version.trained_on;
  return html`
    <tr><th scope="row">${name} ${version.version}</th>
      <td>${trained?.arm ?? "not recorded"}</td><td class="number">${trained?.seed ?? "–"}</td>
      <td><code title=${trained?.commit ?? ""}>${trained?.commit?.slice(0, 7) ?? "–"}</code></td>
      <td><code>${short(version.lineage)}</code></td></tr>
  `;
}
