// Which version served when, and why that changed.

import { html } from "../html.js";
import { when } from "../number.js";
import { Evidence, isEvidence } from "./evidence.js";

/** `history` is that of the API, the oldest change first. */
export function History({ history }) {
  if (history.length === 0) return null;
  return html`
    <details>
      <summary>History</summary>
      <ol class="history">
        ${[...history].reverse().map(
          (change) => html`
          <li>${when(change.time)}: ${changeInWords(change)}<${Reason} evidence=${change.evidence} /></li>
        `,
        )}
      </ol>
    </details>
  `;
}

function Reason({ evidence }) {
  if (evidence == null) return null;
  if (isEvidence(evidence)) return html`<${Evidence} evidence=${evidence} />`;
  return html`<pre tabindex="0">${JSON.stringify(evidence, null, 1)}</pre>`;
}

function changeInWords({ action, from, to }) {
  if (action === "keep") return `${to} was kept`;
  const words = action === "roll_back" ? "rolled back" : "serves";
  if (to === null) return "stopped";
  return from === null ? `${to} ${words}` : `${to} ${words}, before it ${from}`;
}
