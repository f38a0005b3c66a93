// How an answer is judged: the scorers of POST /ablation, in words.

import { html } from "../html.js";

const SCORERS = {
  exact: "Right is a text that equals an answer; case and punctuation do not count.",
  contains: "Right is a text that has the words of an answer, in order and side by side.",
  numeric: "Right is a text whose last number is an answer, within the tolerance below.",
  regex: "Right is a text in which an answer, a pattern of RE2, is found.",
  choice: "Right is a question whose likeliest choice is an answer. Nothing is generated.",
  choice_normalised: "As choice, with each log-probability divided by the number of characters.",
  perplexity: "No verdict: how probable the first answer is. Nothing is generated.",
};
export const FIRST_SCORER = "exact";

/** The list of scorers, and what the chosen one does. */
export function ScorerField({ scorer, onChange }) {
  return html`
    <div>
      <label>Scorer
        <select name="scorer" value=${scorer} onChange=${(event) => onChange(event.target.value)}>
          ${Object.keys(SCORERS).map((name) => html`<option>${name}</option>`)}
        </select>
      </label>
      <p class="hint">${SCORERS[scorer]}</p>
    </div>
  `;
}
