// What exactly answered an ablation, as its result says it.

import { html } from "../html.js";
import { short } from "../number.js";

const NAMES = {
  question_set: "Questions",
  base: "Base model",
  crma: "CRMA backbone",
  engine: "Engine",
  dtype: "Type",
  seed: "Seed",
  choices: "Choices",
};

/** The provenance of a result on a click; a backbone of a named version has that as its name. */
export function Provenance({ provenance }) {
  const { tasks, ...rest } = provenance;
  const named = Object.entries(rest).map(([name, value]) => [NAMES[name] ?? name, value]);
  const rows = [...named, ...Object.entries(tasks ?? {})];
  return html`
    <details class="provenance">
      <summary>Provenance</summary>
      <dl>${rows.map(([name, value]) => html`<div><dt>${name}</dt><dd>${shown(value)}</dd></div>`)}</dl>
    </details>
  `;
}

function shown(value) {
  if (value === null) return "none";
  return typeof value === "object" ? Object.values(value).map(short).join(", ") : value;
}
