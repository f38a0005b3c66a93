// A new ablation: the questions, the variants, and how answers are judged.

import { useState } from "preact/hooks";

import { send } from "../api.js";
import { CheckField, NumberField } from "../field.js";
import { html } from "../html.js";
import { Problem } from "../problem.js";
import { linesNaming, readLines, withLines } from "./question_lines.js";
import { QuestionSource } from "./question_source.js";
import { FIRST_SCORER, ScorerField } from "./scorer.js";
import { TaskFilter } from "./task_filter.js";

const COMPARED_FIRST = ["task+crma", "task"];

/** The form; `onStarted(id)` is called with the id of the job, `onSetsChange()` after sets changed. */
export function AblationForm({ sets, onSetsChange, onStarted }) {
  const [source, setSource] = useState({ set: null, text: "" });
  const [error, setError] = useState(null);
  const [faults, setFaults] = useState([]);
  const [scorer, setScorer] = useState(FIRST_SCORER);
  const [isStarting, setStarting] = useState(false);
  const given = { ...source, set: source.set ?? sets[0]?.name ?? "" };
  const change = (next) => {
    setSource(next);
    setFaults([]);
    setError(null);
  };
  const start = async (event) => {
    event.preventDefault();
    const own = given.set ? null : readLines(given.text);
    if (own?.errors.length) return;
    setStarting(true);
    setError(null);
    setFaults([]);
    try {
      const body = readForm(new FormData(event.target), given.set, own);
      onStarted((await (await send("POST", "ablation", { body })).json()).id);
    } catch (refused) {
      const found = own ? faultsOf(refused, own) : [];
      setFaults(found);
      if (!found.length) setError(refused);
    } finally {
      setStarting(false);
    }
  };
  return html`
    <form class="card ablation-form" onSubmit=${start} aria-label="New ablation">
      <h3>New ablation</h3>
      <${QuestionSource} sets=${sets} source=${given} faults=${faults} onChange=${change}
        onSetsChange=${onSetsChange} />
      <${TaskFilter} source=${given} />
      <fieldset>
        <legend>Variants, compared pair by pair</legend>
        ${["task+crma", "task", "crma", "base"].map(
          (name) => html`
          <${CheckField} name="variant" value=${name} label=${name}
            isChecked=${COMPARED_FIRST.includes(name)} />
        `,
        )}
        <p class="hint">task is the adapter of a question's task, crma the backbone, base neither.</p>
      </fieldset>
      <${ScorerField} scorer=${scorer} onChange=${setScorer} />
      <details>
        <summary>More settings</summary>
        <label>Other variants, such as task@v2 or a second task for a null run
          <input name="others" type="text" placeholder="separated by commas" />
        </label>
        <div class="pair">
          <${NumberField} name="max_tokens" label="Most tokens" value="16" min="1" step="1" />
          <${NumberField} name="temperature" label="Temperature" value="0" min="0" max="2" step="0.1" />
          <${NumberField} name="seed" label="Seed" value="0" min="0" step="1" />
          <${NumberField} name="margin" label="Equivalent within" value="0.02" min="0.001" max="0.999"
            step="0.001" />
          ${
            scorer === "numeric" &&
            html`
            <${NumberField} name="tolerance" label="Tolerance" value="0" min="0" step="any" />
            <${NumberField} name="relative_tolerance" label="Relative tolerance" value="0" min="0"
              step="any" />
          `
          }
        </div>
        <${CheckField} name="own_choices" label="Every answer is one of its question's choices" />
        <${CheckField} name="repeat" label="Run variants apart, even those that choose the same adapters" />
        <${CheckField} name="raw" label="Raw: without the prompt format" />
      </details>
      <div class="row"><button class="main" disabled=${isStarting}>Start</button></div>
      <${Problem} error=${error} />
    </form>
  `;
}

/** The body of POST /ablation; always in the background, so that it has an address. */
function readForm(data, set, own) {
  const others = data
    .get("others")
    .split(",")
    .map((name) => name.trim())
    .filter(Boolean);
  const body = {
    ...(own ? { questions: own.questions } : { question_set: set }),
    variants: [...data.getAll("variant"), ...others],
    scorer: data.get("scorer"),
    background: true,
  };
  for (const name of [
    "max_tokens",
    "temperature",
    "seed",
    "margin",
    "tolerance",
    "relative_tolerance",
  ]) {
    if (data.has(name)) body[name] = Number(data.get(name));
  }
  for (const name of ["repeat", "raw"]) if (data.has(name)) body[name] = true;
  if (data.has("own_choices")) body.choices = "own";
  if (data.has("task")) body.tasks = data.getAll("task");
  return body;
}

/** What the server refused about pasted questions, by line; none if it was something else. */
function faultsOf(error, own) {
  const lines = linesNaming(error, own);
  if (lines.length) return lines.map((line) => `line ${line}: ${error.message}`);
  const told = withLines(error.message, own.lines);
  return told === error.message ? [] : [told];
}
