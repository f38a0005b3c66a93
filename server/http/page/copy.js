// A button that copies a text.

import { useState } from "preact/hooks";

import { html } from "./html.js";

const SHOWN_MS = 1500;

/** Copies `text`; its label says so for a moment. */
export function CopyButton({ text, label }) {
  const [state, setState] = useState("");
  const copy = async () => {
    setState((await copied(text)) ? "Copied" : "Select the text and copy it by hand");
    setTimeout(() => setState(""), SHOWN_MS);
  };
  return html`
    <button type="button" class="small" onClick=${copy} aria-label=${label}>
      <span aria-live="polite">${state || "Copy"}</span>
    </button>
  `;
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text); // missing where the page has no secure origin
    return true;
  } catch {
    return false;
  }
}
