// A box for what may be too wide for a phone. It scrolls by itself, with the keyboard too.

import { html } from "./html.js";

/** `label` says to screen readers what is in it. */
export function Scroll({ label, className = "", children }) {
  return html`
    <div class="scroll ${className}" tabindex="0" role="group" aria-label=${label}>${children}</div>
  `;
}
