// What an administrator does with a version: load, unload, pin, unpin, roll back.

import { useState } from "preact/hooks";

import { send } from "../api.js";
import { html } from "../html.js";
import { Problem } from "../problem.js";

const ACTS = [
  { name: "load", label: "Load" },
  { name: "unload", label: "Unload" },
  { name: "pin", label: "Pin" },
  { name: "unpin", label: "Unpin" },
];

/** The acts on `name@version`; `onDone()` reads everything again. */
export function Acts({ name, version, onDone }) {
  const { act, isBusy, error, done } = useAct(onDone);
  return html`
    <div class="row acts">
      ${ACTS.map(
        (each) => html`
        <button type="button" class="small" disabled=${isBusy} aria-label="${each.label} ${name} ${version}"
          onClick=${() => act("POST", `adapters/${name}@${version}/${each.name}`, each.label)}>
          ${each.label}</button>
      `,
      )}
      <span class="hint" role="status">${done && `${done}: done`}</span>
    </div>
    <${Problem} error=${error} />
  `;
}

/** Goes back to what served before, by a POST to `path`; asks `question` first. */
export function RollBack({ name, path, question, onDone }) {
  const [isSure, setSure] = useState(false);
  const { act, isBusy, error, done } = useAct(onDone);
  const go = async () => {
    setSure(false);
    await act("POST", path, "Roll back");
  };
  return html`
    <div class="row acts">
      ${
        isSure
          ? html`<span>${question}</span>
            <button type="button" class="small danger" onClick=${go}>Yes, roll back</button>
            <button type="button" class="small" onClick=${() => setSure(false)}>No</button>`
          : html`<button type="button" class="small" disabled=${isBusy}
              onClick=${() => setSure(true)}>Roll back ${name}</button>`
      }
      <span class="hint" role="status">${done && `${done}: done`}</span>
    </div>
    <${Problem} error=${error} />
  `;
}

/** {act, isBusy, error, done} of requests that change something. */
export function useAct(onDone) {
  const [state, setState] = useState({ isBusy: false, error: null, done: "" });
  const act = async (method, path, label, options = {}) => {
    setState({ isBusy: true, error: null, done: "" });
    try {
      await send(method, path, options);
      setState({ isBusy: false, error: null, done: label });
      onDone();
    } catch (error) {
      setState({ isBusy: false, error, done: "" });
    }
  };
  return { act, ...state };
}
