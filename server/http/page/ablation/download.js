// A result as a file: JSON as the server sent it, or a row for each question.

import { html } from "../html.js";

/** Buttons for both. */
export function Downloads({ result }) {
  const { id } = result;
  return html`
    <button type="button" class="small"
      onClick=${() => save(`${id}.json`, "application/json", JSON.stringify(result, null, 1))}>
      Download JSON</button>
    <button type="button" class="small" onClick=${() => save(`${id}.csv`, "text/csv", asCsv(result))}>
      Download CSV</button>
  `;
}

/** A header, then a row for each question: id, task, right answers; text and verdict by variant. */
export function asCsv({ items, variants }) {
  const names = Object.keys(variants);
  const header = ["id", "task", "answers", ...names.flatMap((name) => [name, `${name}: right`])];
  const rows = items.map((item) => [
    item.id,
    item.task,
    item.answers.join(" | "),
    ...names.flatMap((name) => [item.outputs[name].text, mark(item.outputs[name])]),
  ]);
  return [header, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

function mark(output) {
  return output.status ?? output.correct ?? output.logprob_per_token;
}

function cell(value) {
  const text = value == null ? "" : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function save(name, type, content) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type }));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}
