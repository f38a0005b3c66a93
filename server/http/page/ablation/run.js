// One ablation by its id: its progress while it runs, then its report. Its address is a permalink.

import { useState } from "preact/hooks";

import { send } from "../api.js";
import { CopyButton } from "../copy.js";
import { html } from "../html.js";
import { fixed, when } from "../number.js";
import { Problem } from "../problem.js";
import { Downloads } from "./download.js";
import { ENDED, useJob } from "./job.js";
import { Provenance } from "./provenance.js";
import { Report } from "./report.js";

/** The run; `onStarted(id)` opens another. */
export function Run({ id, onStarted }) {
  const { job, error } = useJob(id);
  if (!job) return error ? html`<${Problem} error=${error} />` : html`<p class="hint">Loading…</p>`;
  const hasEnded = ENDED.includes(job.status);
  return html`
    <div class="card">
      <div class="row spread">
        <h3>${titleOf(job.request)}</h3>
        <span class="badge ${job.status}">${job.status}</span>
      </div>
      <p class="hint">${job.request.variants?.join(", ") ?? "task+crma, task"} · scorer${" "}
        ${job.request.scorer ?? "exact"}${onlyTasks(job.request)} · started ${when(job.created)}${job.result && html` · ${fixed(job.result.wall_s, 1)} s`}</p>
      ${!hasEnded && html`<${Progress} id=${id} job=${job} />`}
      ${job.error && html`<p class="problem" role="alert">${job.error.message ?? job.error}</p>`}
      <${Problem} error=${error} />
      <div class="row actions">
        <span class="hint">Permalink</span>
        <${CopyButton} text=${location.href} label="Copy the permalink" />
        ${job.result && html`<${Downloads} result=${job.result} />`}
        ${hasEnded && html`<${Again} request=${job.request} onStarted=${onStarted} />`}
      </div>
      ${job.result && html`<${Provenance} provenance=${job.result.provenance} />`}
    </div>
    ${job.result && html`<${Report} request=${job.request} result=${job.result} />`}
  `;
}

function onlyTasks({ tasks }) {
  return tasks ? ` · only ${tasks.join(", ")}` : "";
}

/** What a run is called. */
export function titleOf({ question_set: name, questions }) {
  if (name) return name;
  return questions ? `${questions.length} pasted questions` : "pasted questions";
}

function Progress({ id, job }) {
  const [error, setError] = useState(null);
  const { done, total } = job.progress;
  const cancel = () => send("DELETE", `ablation/${encodeURIComponent(id)}`).catch(setError);
  return html`
    <div class="row progress">
      <progress value=${done} max=${total} aria-label="Progress"></progress>
      <span class="figure" role="status">${done} of ${total}</span>
      <button type="button" class="danger small" onClick=${cancel}>Cancel</button>
    </div>
    <${Problem} error=${error} />
  `;
}

/** Runs the same again: with the same adapters, or it is refused. */
function Again({ request, onStarted }) {
  const [error, setError] = useState(null);
  const run = async (body) => {
    try {
      onStarted(
        (await (await send("POST", "ablation", { body: { ...body, background: true } })).json()).id,
      );
    } catch (refused) {
      setError(refused);
    }
  };
  const { provenance, ...now } = request;
  return html`
    <button type="button" class="small" onClick=${() => run(request)}>Run again</button>
    ${
      error?.status === 409 &&
      html`
      <button type="button" class="small" onClick=${() => run(now)}>Run with what serves now</button>
    `
    }
    <${Problem} error=${error} />
  `;
}
