// An error as people read it: what the server said, and what it would have taken.

import { html } from "./html.js";

const MAX_ALLOWED = 200;

/** Shows an ApiError; nothing without one, and of a key that is needed, because its form says so. */
export function Problem({ error }) {
  if (!error || error.status === 401) return null;
  return html`
    <p class="problem" role="alert">
      ${ended(error.message)}
      ${error.allowed != null && html` <span class="allowed">${inWords(error.allowed)}</span>`}
    </p>
  `;
}

function ended(message) {
  return /[.!?]$/.test(message) ? message : `${message}.`;
}

function inWords(allowed) {
  const text = Array.isArray(allowed) ? allowed.join(", ") : String(allowed);
  const shown = text.length > MAX_ALLOWED ? `${text.slice(0, MAX_ALLOWED)}…` : text;
  return `Allowed: ${shown}.`;
}
