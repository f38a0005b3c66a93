// Fields of forms. What a person typed stays: a default is no value.

import { html } from "./html.js";

/** A number with its limits. */
export function NumberField({ name, label, value, min, max, step }) {
  return html`
    <label>${label}
      <input name=${name} type="number" defaultValue=${value} min=${min} max=${max} step=${step} required />
    </label>
  `;
}

/** A box to tick. */
export function CheckField({ name, label, value, isChecked = false, onChange }) {
  return html`
    <label class="check">
      <input type="checkbox" name=${name} value=${value} defaultChecked=${isChecked} onChange=${onChange} />
      ${label}
    </label>
  `;
}
