// Asks for a key where the server wants one.

import { useState } from "preact/hooks";

import { ApiError, get } from "./api.js";
import { html } from "./html.js";
import { storedKey, storeKey } from "./key.js";
import { Problem } from "./problem.js";

const NOT_TAKEN = "The server does not take this key. Whoever runs it can give you one.";

/** A field for the key; `onChange` is called once the server has taken it. */
export function KeyForm({ isNeeded, onChange }) {
  const [error, setError] = useState(null);
  const [isChecking, setChecking] = useState(false);
  const use = async (event) => {
    event.preventDefault();
    const before = storedKey();
    storeKey(new FormData(event.target).get("key").trim());
    setChecking(true);
    try {
      await get("adapters");
      setError(null);
      event.target.reset();
      onChange();
    } catch (refused) {
      storeKey(before);
      setError(refused.status === 401 ? new ApiError(NOT_TAKEN) : refused);
    } finally {
      setChecking(false);
    }
  };
  const forget = () => {
    storeKey("");
    setError(null);
    onChange();
  };
  return html`
    <form class="key ${isNeeded ? "needed" : ""}" onSubmit=${use}>
      <label for="key">${isNeeded ? "This server asks for a key" : "Key"}</label>
      <div class="row">
        <input id="key" name="key" type="password" autocomplete="off" required
          placeholder=${storedKey() ? "another key" : "API key or admin key"} />
        <button disabled=${isChecking}>Use key</button>
        ${storedKey() && html`<button type="button" class="quiet" onClick=${forget}>Forget key</button>`}
      </div>
      <p class="hint">It stays in this browser tab, and is forgotten when the tab closes.</p>
      <${Problem} error=${error} />
    </form>
  `;
}
