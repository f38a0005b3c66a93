// The tab Adapters: the base model, the backbone and its certificate, the tasks and their versions.

import { useState } from "preact/hooks";

import { html } from "../html.js";
import { storedKey } from "../key.js";
import { Problem } from "../problem.js";
import { Backbone } from "./backbone.js";
import { Task } from "./task.js";
import { Upload } from "./upload.js";

/** The tab. */
export function Adapters({ adapters }) {
  const [round, setRound] = useState(0);
  const [isAdmin, setAdmin] = useState(Boolean(storedKey()));
  if (!adapters.value) return html`<h2>Adapters</h2><${Problem} error=${adapters.error} />`;
  const { base, backbone, tasks } = adapters.value;
  const done = () => {
    setRound((number) => number + 1);
    adapters.reload();
  };
  return html`
    <div class="row spread">
      <h2>Adapters</h2>
      <label class="check">
        <input type="checkbox" checked=${isAdmin}
          onChange=${(event) => setAdmin(event.target.checked)} />
        Show what an admin key may do
      </label>
    </div>
    <div class="adapters">
      <div>
        <section class="card" aria-labelledby="base-heading">
          <h3 id="base-heading">Base model</h3>
          <dl class="facts">
            <div><dt>Name</dt><dd>${base.name}</dd></div>
            <div><dt>Digest</dt><dd class="mono">${base.digest}</dd></div>
            <div><dt>Type</dt><dd>${base.dtype}</dd></div>
            <div><dt>Longest text</dt><dd>${base.max_model_len} tokens</dd></div>
          </dl>
        </section>
        <section class="card" aria-labelledby="backbone-heading">
          <h3 id="backbone-heading">CRMA backbone</h3>
          <${Backbone} backbone=${backbone} round=${round} isAdmin=${isAdmin} onDone=${done} />
        </section>
        ${isAdmin && html`<${Upload} onDone=${done} />`}
      </div>
      <div>
        ${tasks.length === 0 && html`<p class="hint">No task serves. <code>crma store import</code> publishes a LoRA,
            <code>crma train --ship</code> what it trains. With an admin key it can be uploaded here.</p>`}
        ${tasks.map(
          (task) => html`
          <${Task} key=${task.name} name=${task.name} round=${round} isAdmin=${isAdmin}
            onDone=${done} />
        `,
        )}
      </div>
    </div>
  `;
}
