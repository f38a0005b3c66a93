// One training run: its matrices, its drift, and the norm log beside what it cannot show.

import { get } from "../api.js";
import { html } from "../html.js";
import { fixed, percent } from "../number.js";
import { Problem } from "../problem.js";
import { useResource } from "../resource.js";
import { Scroll } from "../scroll.js";
import { Matrix } from "./matrix.js";

const SUPERSCRIPTS = Object.fromEntries(
  [..."-0123456789"].map((each, i) => [each, [..."⁻⁰¹²³⁴⁵⁶⁷⁸⁹"][i]]),
);

/** `id` is one that GET /runs lists. */
export function Run({ id }) {
  const run = useResource((signal) => get(`runs/${id}`, signal), [id]);
  if (!run.value) return html`<div class="card"><${Problem} error=${run.error} /></div>`;
  const record = run.value;
  const largest = Math.max(...record.loss.flat());
  return html`
    <section class="card" aria-labelledby="run-heading">
      <h3 id="run-heading">${record.arm}, seed ${record.seed}</h3>
      <p class="hint">${id} · commit ${record.commit} · ${record.steps} steps</p>
      <${Matrix} title="Accuracy after each stage" tasks=${record.order} rows=${record.accuracy}
        show=${(value) => percent(value)} shade=${(value) => value} />
      <${Matrix} title="Loss after each stage, in nats a token" tasks=${record.order} rows=${record.loss}
        show=${(value) => fixed(value, 3)} shade=${(value) => value / largest} />
      <${Measures} record=${record} />
      <${Drift} record=${record} />
      <${NormLog} record=${record} />
    </section>
  `;
}

function Measures({ record }) {
  const rows = [
    ["ACC: mean accuracy at the end", percent(record.ACC, 1)],
    ["BWT: change since a task was learned", points(record.BWT)],
    ["FWT: before a task is learned, above the base model", points(record.FWT)],
    ["Mean loss at the end", `${fixed(record.mean_loss, 4)} nats`],
  ];
  return html`
    <dl class="facts wide">
      ${rows.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}
    </dl>
  `;
}

function Drift({ record }) {
  return html`
    <h4>Drift: growth of a task's loss since it was learned</h4>
    <${Scroll} label="Drift by task"><table>
      <thead><tr><th scope="col">Task</th><th scope="col" class="number">Percent</th>
        <th scope="col" class="number">Nats a token</th><th scope="col" class="number">Gain retained</th></tr></thead>
      <tbody>
        ${record.order.map(
          (task, t) => html`
          <tr><th scope="row">${task}</th><td class="number">${shown(record.drift?.[t], 2)}</td>
            <td class="number">${shown(record.drift_nats?.[t], 4)}</td>
            <td class="number">${percent(record.retained_gain?.[t], 2)}</td></tr>
        `,
        )}
      </tbody>
    </table><//>
  `;
}

function NormLog({ record }) {
  const log = record.norm_log ?? {};
  if (log.steps === undefined)
    return html`<p class="hint">This arm has no backbone, so it has no norm log.</p>`;
  return html`
    <h4>Norm log, and what it cannot show</h4>
    <div class="beside">
      <dl class="facts wide">
        <div>
          <dt>Largest deviation of the norm of M from 1</dt>
          <dd>${scientific(log.max_norm_deviation)}</dd>
        </div>
        <div><dt>over</dt><dd>${log.steps} steps, all layers</dd></div>
      </dl>
      <dl class="facts wide">
        <div><dt>M moved by, at the end</dt><dd>${scientific(log.max_moved_last)}</dd></div>
        <div><dt>Gradient of S, median</dt><dd>${scientific(log.median_grad_S)}</dd></div>
      </dl>
    </div>
    <p class="hint">
      Every doubly stochastic matrix has norm 1. A norm that stays at 1 shows that M is doubly
      stochastic, not that the backbone learned or that a task was kept: movement, gradient and
      drift show that.
    </p>
  `;
}

/** Null: nothing was sequential, or what it needs was not measured. */
function points(share) {
  return share == null ? "–" : `${fixed(share * 100, 2)} points`;
}

function shown(value, digits) {
  return value == null ? "–" : fixed(value, digits);
}

function scientific(value) {
  if (value == null) return "–";
  const [digits, power] = value.toExponential(2).split("e");
  const raised = [...power.replace("+", "")].map((each) => SUPERSCRIPTS[each]).join("");
  return `${digits} × 10${raised}`;
}
