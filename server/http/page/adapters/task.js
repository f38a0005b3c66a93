// One task: its versions, and which of them served when.

import { get } from "../api.js";
import { html } from "../html.js";
import { fixed, percent, short, when } from "../number.js";
import { Problem } from "../problem.js";
import { useResource } from "../resource.js";
import { Acts, RollBack } from "./acts.js";
import { History } from "./history.js";

/** `round` changes when something was changed; `isAdmin` shows what administrators may do. */
export function Task({ name, round, isAdmin, onDone }) {
  const task = useResource(
    (signal) => get(`adapters/${encodeURIComponent(name)}`, signal),
    [name, round],
  );
  if (!task.value)
    return html`<div class="card"><h3>${name}</h3><${Problem} error=${task.error} /></div>`;
  const { versions, history } = task.value;
  return html`
    <section class="card task" aria-label="Task ${name}">
      <div class="row spread"><h3>${name}</h3><span class="hint">serves ${task.value.serving}</span></div>
      ${[...versions].reverse().map(
        (version) => html`
        <${Version} key=${version.version} version=${version} isAdmin=${isAdmin} onDone=${onDone} />
      `,
      )}
      ${
        isAdmin &&
        history.length > 1 &&
        html`<${RollBack} name=${name} path="adapters/${encodeURIComponent(name)}/rollback"
          question="Serve the version of ${name} that served before?" onDone=${onDone} />`
      }
      <${History} history=${history} />
    </section>
  `;
}

function Version({ version, isAdmin, onDone }) {
  if (version.problem) {
    return html`
      <div class="version">
        <h4>${version.version}</h4>
        <p class="problem">${version.problem}</p>
      </div>
    `;
  }
  const { measured } = version;
  return html`
    <div class="version">
      <div class="row">
        <h4>${version.version}</h4>
        ${version.serves && html`<span class="badge done">serves</span>`}
        <span class="badge">${version.resident ? "in memory" : "not loaded"}</span>
      </div>
      <dl class="facts">
        <div><dt>Digest</dt><dd><code title=${version.digest}>${short(version.digest)}</code></dd></div>
        <div>
          <dt>Trained on backbone</dt>
          <dd><code title=${version.lineage ?? ""}>${short(version.lineage)}</code></dd>
        </div>
        <div><dt>Rank, scaling</dt><dd>${version.rank}, ${version.scaling}</dd></div>
        <div><dt>Target modules</dt><dd>${version.target_modules.join(", ")}</dd></div>
        <div><dt>Prompt format</dt><dd>${version.prompt_format ?? "none"}</dd></div>
        <div><dt>Licence</dt><dd>${version.licence}</dd></div>
        <div><dt>Published</dt><dd>${when(version.created)}</dd></div>
        ${Object.entries(measured).map(
          ([split, found]) => html`
          <div><dt>Measured, ${split}</dt><dd>${measuredInWords(found)}</dd></div>
        `,
        )}
      </dl>
      ${isAdmin && html`<${Acts} name=${version.name} version=${version.version} onDone=${onDone} />`}
    </div>
  `;
}

function measuredInWords(found) {
  if (found === null || typeof found !== "object") return String(found);
  const { accuracy, wilson, loss, items } = found;
  const parts = [];
  if (accuracy != null) {
    const interval = wilson
      ? ` (${fixed(wilson[0] * 100, 1)} to ${fixed(wilson[1] * 100, 1)})`
      : "";
    parts.push(`${percent(accuracy, 1)}${interval} right`);
  }
  if (items != null) parts.push(`of ${items}`);
  if (loss != null) parts.push(`loss ${fixed(loss, 3)}`);
  return parts.join(", ");
}
