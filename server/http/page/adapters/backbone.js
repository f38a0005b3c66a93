// The CRMA backbone: its certificate, its versions, and how an administrator changes which serves.

import { get } from "../api.js";
import { html } from "../html.js";
import { short, when } from "../number.js";
import { Problem } from "../problem.js";
import { useResource } from "../resource.js";
import { RollBack } from "./acts.js";
import { Certificate } from "./certificate.js";
import { History } from "./history.js";
import { Promotion } from "./promotion.js";

const BACK =
  "Serve the backbone that served before? Tasks that need the newer one go back too, or stop.";

/** `backbone` is that of GET /adapters; `round` changes when something was changed. */
export function Backbone({ backbone, round, isAdmin, onDone }) {
  const record = useResource((signal) => get("backbones", signal), [round]);
  const { certificate } = backbone ?? {};
  return html`
    ${!backbone && html`<p class="hint">None is loaded.</p>`}
    ${certificate?.layers && html`<${Certificate} certificate=${certificate} />`}
    <${Problem} error=${record.error} />
    ${record.value && html`<${Versions} record=${record.value} isAdmin=${isAdmin} onDone=${onDone} />`}
  `;
}

function Versions({ record, isAdmin, onDone }) {
  const { versions, history, promotion } = record;
  const candidates = versions.filter((each) => !each.serves && !each.problem);
  const numServed = history.filter((change) => change.action === "serve").length;
  return html`
    ${[...versions].reverse().map((version) => html`<${Version} key=${version.version} version=${version} />`)}
    ${
      isAdmin &&
      html`<${Promotion} candidates=${candidates.map((each) => each.version)} last=${promotion}
        onDone=${onDone} />`
    }
    ${
      isAdmin &&
      numServed > 1 &&
      html`<${RollBack} name="the backbone" path="backbones/rollback" question=${BACK} onDone=${onDone} />`
    }
    <${History} history=${history} />
  `;
}

function Version({ version }) {
  const { version: name, serves, problem, digest, blend, licence, created } = version;
  return html`
    <div class="version">
      <div class="row">
        <h4>${name}</h4>
        ${serves && html`<span class="badge done">serves</span>`}
      </div>
      ${
        problem
          ? html`<p class="problem">${problem}</p>`
          : html`
            <dl class="facts">
              <div><dt>Digest</dt><dd class="mono">${digest}</dd></div>
              ${
                blend &&
                html`<div><dt>Blend</dt><dd>${blend.lambda} of the way from
                  <code>${short(blend.parents[0])}</code> to <code>${short(blend.parents[1])}</code></dd></div>`
              }
              <div><dt>Licence</dt><dd>${licence}</dd></div>
              <div><dt>Published</dt><dd>${when(created)}</dd></div>
            </dl>
          `
      }
    </div>
  `;
}
