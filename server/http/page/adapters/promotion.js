// Lets a backbone serve: first a dry run, whose evidence is shown, then the same in earnest.

import { useEffect, useState } from "preact/hooks";

import { get, send } from "../api.js";
import { NumberField } from "../field.js";
import { html } from "../html.js";
import { Problem } from "../problem.js";
import { Evidence } from "./evidence.js";

const AGAIN_MS = 1000;
const SHOWN_LINES = 12;

/**
 * `candidates` are versions that may be promoted; `last` is the promotion that the server ran last.
 * `onDone()` reads what serves again.
 */
export function Promotion({ candidates, last, onDone }) {
  const { promotion, error, ask } = usePromotion(last, onDone);
  const isRunning = promotion?.status === "running";
  const start = (version, body) => ask("POST", `backbones/${version}/promote`, body);
  return html`
    <h4>Promote a backbone</h4>
    ${
      candidates.length === 0
        ? html`<p class="hint">No other version is published here. <code>crma train --ship</code> publishes one.</p>`
        : html`<${DryRun} candidates=${candidates} isRunning=${isRunning} onStart=${start} />`
    }
    <div class="row">
      ${
        isRunning &&
        html`<button type="button" class="danger small"
          onClick=${() => ask("DELETE", "backbones/promotion")}>Cancel</button>`
      }
      <span class="hint" role="status">${promotion && stateInWords(promotion)}</span>
    </div>
    <${Problem} error=${error} />
    ${isRunning && html`<pre tabindex="0">${promotion.lines.slice(-SHOWN_LINES).join("\n")}</pre>`}
    ${promotion?.error && html`<p class="problem" role="alert">${promotion.error}</p>`}
    ${promotion?.evidence && html`<${Evidence} evidence=${promotion.evidence} />`}
    ${
      isPromising(promotion, candidates) &&
      html`<button type="button" class="main"
        onClick=${() => start(promotion.version, inEarnest(promotion))}>Promote ${promotion.version}</button>
        <p class="hint">The gate measures once more, then all tasks move together, or nothing does.</p>`
    }
  `;
}

/** {promotion, error, ask}, where the promotion is followed while it runs. */
function usePromotion(last, onDone) {
  const [promotion, setPromotion] = useState(last);
  const [error, setError] = useState(null);
  useEffect(() => {
    if (promotion?.status !== "running") return undefined;
    const timer = setTimeout(async () => {
      try {
        const next = await get("backbones/promotion");
        setPromotion(next);
        setError(null);
        if (next.status === "done" && !next.dry_run) onDone();
      } catch (failed) {
        setError(failed);
        setPromotion({ ...promotion }); // and it is asked for again
      }
    }, AGAIN_MS);
    return () => clearTimeout(timer);
  }, [promotion]);
  const ask = async (method, path, body) => {
    setError(null);
    try {
      setPromotion(await (await send(method, path, { body })).json());
    } catch (refused) {
      setError(refused);
    }
  };
  return { promotion, error, ask };
}

function DryRun({ candidates, isRunning, onStart }) {
  const submit = (event) => {
    event.preventDefault();
    const data = new FormData(event.target);
    onStart(data.get("version"), readForm(data));
  };
  return html`
    <form class="promotion" onSubmit=${submit} aria-label="Promote a backbone">
      <p class="hint">A dry run scores every task under the candidate, on the task's own validation questions and
        with a second copy of the base model on the server's machine. It takes minutes, and changes nothing.</p>
      <div class="pair">
        <label>Candidate
          <select name="version">${candidates.map((version) => html`<option>${version}</option>`)}</select>
        </label>
        <label>Tasks that need no score
          <input name="ungated" type="text" placeholder="separated by commas" />
        </label>
        <${NumberField} name="margin" label="A task may get worse by, %" value="1" min="0" max="100"
          step="any" />
        <${NumberField} name="newcomer_margin" label="A new task by, %" value="10" min="0" max="100"
          step="any" />
      </div>
      <div class="row"><button disabled=${isRunning}>Dry run</button></div>
    </form>
  `;
}

function readForm(data) {
  const ungated = data.get("ungated").split(",").map((name) => name.trim());
  return {
    dry_run: true,
    margin: Number(data.get("margin")) / 100,
    newcomer_margin: Number(data.get("newcomer_margin")) / 100,
    allow_ungated: ungated.filter(Boolean),
  };
}

/** What a dry run asked, now to change what serves. */
function inEarnest({ margin, newcomer_margin, allow_ungated }) {
  return { dry_run: false, margin, newcomer_margin, allow_ungated };
}

/** Whether a dry run found that its candidate may serve, and it does not yet. */
function isPromising(promotion, candidates) {
  if (promotion?.status !== "done" || !promotion.dry_run) return false;
  return promotion.evidence.lambda > 0 && candidates.includes(promotion.version);
}

function stateInWords({ status, dry_run: isDry, version, evidence }) {
  const what = isDry ? `dry run of ${version}` : `promotion of ${version}`;
  if (status !== "done") return `${what}: ${status}`;
  if (isDry) return `${what}: done, nothing has changed`;
  return evidence.lambda > 0 ? `${version} was promoted` : `${what}: refused, nothing has changed`;
}
