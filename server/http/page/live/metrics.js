// GET /metrics as values: Prometheus's text, read and summed over labels.

import { send } from "../api.js";

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** The samples of the server at this moment, [{name, labels, value}]. Throws as `send`. */
export async function readMetrics(signal) {
  return readText(await (await send("GET", "metrics", { signal })).text());
}

/** The samples of a text. */
export function readText(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const found = SAMPLE.exec(line);
    if (found === null) continue; // a comment, or empty
    const labels = Object.fromEntries(
      [...(found[2] ?? "").matchAll(LABEL)].map(([, name, value]) => [name, value]),
    );
    samples.push({ name: found[1], labels, value: Number(found[3]) });
  }
  return samples;
}

/** The sum of a metric over its labels. */
export function total(samples, name) {
  return samples.filter((each) => each.name === name).reduce((sum, each) => sum + each.value, 0);
}
