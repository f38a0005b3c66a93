// The 2 x 2 table of a comparison: gained, lost, both right, both wrong. A cell shows its questions.

import { html } from "../html.js";

/** The kinds of an item in a comparison of a with b: [name, cell of the API's table, label]. */
export const KINDS = [
  ["gained", "a_only", "gained"],
  ["lost", "b_only", "lost"],
  ["both_wrong", "neither", "both wrong"],
  ["both_right", "both", "both right"],
];

/** The kind of an item in a comparison; "unscored" if one of its answers has no verdict. */
export function kindOf(item, { a, b }) {
  const inA = item.outputs[a].correct;
  const inB = item.outputs[b].correct;
  if (inA === null || inB === null) return "unscored";
  if (inA === inB) return inA ? "both_right" : "both_wrong";
  return inA ? "gained" : "lost";
}

/** The table; `onPick(kind)` shows the questions of a cell. */
export function FlipTable({ comparison, picked, onPick }) {
  const { a, b, table } = comparison;
  const cell = (kind) => {
    const [, field, label] = KINDS.find(([name]) => name === kind);
    return html`
      <td class="flip ${kind}">
        <button type="button" aria-pressed=${picked === kind}
          onClick=${() => onPick(picked === kind ? null : kind)}>
          <strong>${table[field]}</strong> ${label}
        </button>
      </td>
    `;
  };
  return html`
    <table class="flips">
      <caption class="hidden">${a} against ${b}: questions right and wrong</caption>
      <thead>
        <tr><td></td><th scope="col">${b} right</th><th scope="col">${b} wrong</th></tr>
      </thead>
      <tbody>
        <tr><th scope="row">${a} right</th>${cell("both_right")}${cell("gained")}</tr>
        <tr><th scope="row">${a} wrong</th>${cell("lost")}${cell("both_wrong")}</tr>
      </tbody>
    </table>
  `;
}
