// How tokens are chosen: the fields of the same names of POST /generate.

import { CheckField, NumberField } from "../field.js";
import { html } from "../html.js";

/** name, label, default of the server, limits and step of its field. */
const FIELDS = [
  { name: "max_tokens", label: "Most tokens", value: 64, min: 1, max: 100_000, step: 1 },
  { name: "temperature", label: "Temperature", value: 0, min: 0, max: 2, step: 0.1 },
  { name: "top_p", label: "top_p", value: 1, min: 0.01, max: 1, step: 0.01 },
  { name: "top_k", label: "top_k (0: off)", value: 0, min: 0, max: 100_000, step: 1 },
  { name: "min_p", label: "min_p", value: 0, min: 0, max: 1, step: 0.01 },
  {
    name: "repetition_penalty",
    label: "Repetition penalty",
    value: 1,
    min: 0.01,
    max: 2,
    step: 0.01,
  },
  { name: "presence_penalty", label: "Presence penalty", value: 0, min: -2, max: 2, step: 0.1 },
  { name: "frequency_penalty", label: "Frequency penalty", value: 0, min: -2, max: 2, step: 0.1 },
];

/** The fields of a form that say how to sample; those at their default are left out. */
export function readSampling(data) {
  const body = {};
  for (const { name, value } of FIELDS) {
    const given = Number(data.get(name));
    if (name === "max_tokens" || given !== value) body[name] = given;
  }
  const seed = data.get("seed").trim();
  if (seed) body.seed = Number(seed);
  const stop = data.get("stop");
  if (stop) body.stop = stop;
  if (data.get("raw")) body.raw = true;
  return body;
}

/** The fields; the rarer ones on a click. */
export function Sampling() {
  const [length, temperature, ...rare] = FIELDS;
  return html`
    <div class="pair">${[length, temperature].map(NumberField)}</div>
    <details>
      <summary>More of sampling</summary>
      <div class="pair">
        ${rare.map(NumberField)}
        <label>Seed <input name="seed" type="number" min="0" step="1" placeholder="drawn" /></label>
        <label>Stop text <input name="stop" type="text" maxlength="256" placeholder="none" /></label>
      </div>
      <${CheckField} name="raw" label="Raw: without the prompt format" />
    </details>
  `;
}
