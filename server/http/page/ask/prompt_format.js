// The prompt format that a question was put into: variants are compared in one.

import { html } from "../html.js";

const BASE = "base";

/** The choice of the format that all variants are asked in. `task` is one of GET /adapters. */
export function FormatField({ task }) {
  return html`
    <label>Prompt format of all four
      <select name="format">
        <option value="task">that of ${task.name} (${task.prompt_format})</option>
        <option value="base">that of the base model, its chat template</option>
        <option value="own">each its own: what differs may be the format</option>
      </select>
    </label>
  `;
}

/** The field `format_of` that a filled form asks for; undefined: each variant has its own. */
export function formatOf(data, task) {
  if (data.get("raw") || !task) return undefined;
  return { task, base: BASE }[data.get("format")];
}

/** Says which format was used. `asked` has the bodies, `tasks` are those of GET /adapters. */
export function formatInWords(asked, tasks) {
  const { raw, format_of: shared } = asked[0].body;
  if (raw) return "Asked as it is, without a prompt format.";
  if (shared === BASE) return "All asked in the base model's chat template.";
  if (shared) return `All asked in the prompt format of ${described(shared, tasks)}.`;
  const task = asked.map((each) => each.body.task).find(Boolean);
  if (!task) return "Asked in the base model's chat template.";
  const own = `the prompt format of ${described(task, tasks)}`;
  if (asked.length === 1) return `Asked in ${own}.`;
  return `Not alike: base and crma asked in the base model's chat template, the others in ${own}.`;
}

function described(name, tasks) {
  const found = tasks.find((each) => each.name === name);
  return found ? `${name} (${found.prompt_format})` : name;
}
