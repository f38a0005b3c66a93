// What the gate measured, and what it decided: the evidence of a promotion as a table.

import { html } from "../html.js";
import { fixed } from "../number.js";
import { Scroll } from "../scroll.js";

/** Whether a change of the history has evidence of the gate. */
export function isEvidence(value) {
  return Array.isArray(value?.tried);
}

/** The decision in a sentence; `lambda` is the weight of the candidate that may serve. */
export function decisionInWords({ lambda }) {
  if (lambda === 0) return "The backbone that serves stays: at every weight a task got worse than allowed.";
  if (lambda === 1) return "The candidate may serve as it is: no task got worse than allowed.";
  return `A blend may serve, ${fixed(lambda * 100, 0)} % of the way to the candidate: no task got worse than allowed.`;
}

/** The table: a row for each task at each weight that was tried. */
export function Evidence({ evidence }) {
  const { tried, limits, ungated } = evidence;
  const rows = tried.flatMap((trial) =>
    Object.entries(trial.tasks).map(([task, found]) => ({
      ...found,
      task,
      weight: trial.lambda,
      limit: limits[task],
      isHarmed: trial.harmed.includes(task),
    })),
  );
  return html`
    <div class="evidence">
      <p><strong>${decisionInWords(evidence)}</strong></p>
      ${rows.length > 0 ? html`<${Measures} rows=${rows} />` : html`<p class="hint">No task was scored.</p>`}
      ${Object.entries(ungated ?? {}).map(
        ([task, reason]) => html`<p class="hint">${task} was not scored: ${reason}</p>`,
      )}
    </div>
  `;
}

function Measures({ rows }) {
  return html`
    <${Scroll} label="What the gate measured">
      <table>
        <thead><tr>
          <th scope="col">Task</th><th scope="col" class="number">Weight</th>
          <th scope="col" class="number">Loss</th><th scope="col" class="number">Limit</th>
          <th scope="col" class="number">Against what serves</th>
          <th scope="col" class="number">Since publication</th><th scope="col">Verdict</th>
        </tr></thead>
        <tbody>
          ${rows.map(
            (row) => html`
            <tr>
              <th scope="row">${row.task}</th>
              <td class="number">${fixed(row.weight, 3)}</td>
              <td class="number">${fixed(row.loss, 4)}</td>
              <td class="number">${fixed(row.limit.limit, 4)}</td>
              <td class="number">${change(row.change)}</td>
              <td class="number">${change(row.drift)}</td>
              <td><span class="verdict ${row.isHarmed ? "wrong" : "right"}">
                ${row.isHarmed ? "worse than allowed" : "ok"}</span></td>
            </tr>
          `,
          )}
        </tbody>
      </table>
    <//>
    <p class="hint">Losses on each task's validation questions, in nats a token. Weight 1 is the candidate, 0 the
      backbone that serves.</p>
  `;
}

function change(percent) {
  if (percent == null) return "new here";
  return `${percent > 0 ? "+" : ""}${fixed(percent, 2)} %`;
}
