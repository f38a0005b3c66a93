// Question sets that are kept on the server: one from here, or one that is no longer wanted.

import { useState } from "preact/hooks";

import { send } from "../api.js";
import { html } from "../html.js";
import { Problem } from "../problem.js";

const TYPE = "application/x-ndjson";
const NAME = /^[a-z0-9][a-z0-9._-]{0,63}$/;

/** Keeps a text under a name; `onKept(name)` is called once it is there. */
export function KeepSet({ text, onKept }) {
  const [name, setName] = useState("");
  const [error, setError] = useState(null);
  const [isBusy, setBusy] = useState(false);
  const keep = async () => {
    setBusy(true);
    setError(null);
    try {
      await send("PUT", pathOf(name), { content: text, type: TYPE });
      onKept(name);
    } catch (refused) {
      setError(refused);
    } finally {
      setBusy(false);
    }
  };
  const canKeep = NAME.test(name) && text.trim() !== "" && !isBusy;
  const keepByKey = (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault(); // it would start the ablation
    if (canKeep) keep();
  };
  return html`
    <details>
      <summary>Keep it on the server</summary>
      <div class="row">
        <label class="grow">Name of the set
          <input type="text" value=${name} placeholder="my-questions" onKeyDown=${keepByKey}
            onInput=${(event) => setName(event.target.value)} />
        </label>
        <button type="button" disabled=${!canKeep} onClick=${keep}>
          ${isBusy ? "Keeping" : "Keep"}</button>
      </div>
      <p class="hint">It is for your key only, and replaces an earlier one of that name. With an admin key every
        key may ask it.</p>
      <${Problem} error=${error} />
    </details>
  `;
}

/** Deletes a set that was kept; asks once more first. `set` is one of GET /question_sets. */
export function DeleteSet({ set, onDeleted }) {
  const [isSure, setSure] = useState(false);
  const [error, setError] = useState(null);
  const remove = async () => {
    setSure(false);
    try {
      await send("DELETE", pathOf(set.name));
      onDeleted();
    } catch (refused) {
      setError(refused);
    }
  };
  return html`
    <div class="row">
      ${
        isSure
          ? html`<span>Delete ${set.name} from the server?</span>
            <button type="button" class="small danger" onClick=${remove}>Yes, delete</button>
            <button type="button" class="small" onClick=${() => setSure(false)}>No</button>`
          : html`<button type="button" class="small" onClick=${() => setSure(true)}>
              Delete ${set.name}</button>`
      }
    </div>
    <${Problem} error=${error} />
  `;
}

function pathOf(name) {
  return `question_sets/${encodeURIComponent(name)}`;
}
