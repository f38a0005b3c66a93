// Which questions: a set of the server, or one that is pasted or dropped here.

import { useState } from "preact/hooks";

import { html } from "../html.js";
import { count } from "../number.js";
import { DeleteSet, KeepSet } from "./kept_set.js";
import { EXAMPLE_LINES, readLines } from "./question_lines.js";

const MAX_TOLD = 20;
const OWN = ""; // the choice of the list that is no set of the server

/**
 * `sets` are the server's; `source` is {set, text}, `onChange` takes a new one, and `faults` is what
 * the server found wrong with the text. `onSetsChange` reads the server's sets again.
 */
export function QuestionSource({ sets, source, faults, onChange, onSetsChange }) {
  const [isOver, setOver] = useState(false);
  const chosen = sets.find((each) => each.name === source.set);
  const kept = (name) => {
    onSetsChange();
    onChange({ ...source, set: name });
  };
  const deleted = () => {
    onSetsChange();
    onChange({ ...source, set: OWN });
  };
  const drop = async (event) => {
    event.preventDefault();
    setOver(false);
    const file = event.dataTransfer.files[0];
    if (file) onChange({ set: OWN, text: await file.text() });
  };
  const over = (event) => {
    event.preventDefault();
    setOver(true);
  };
  return html`
    <div class="source ${isOver ? "over" : ""}" onDragOver=${over} onDragLeave=${() => setOver(false)}
      onDrop=${drop}>
      <label>Question set
        <select value=${source.set} onChange=${(event) => onChange({ ...source, set: event.target.value })}>
          ${sets.map(
            (each) => html`
            <option value=${each.name}>${each.name} (${count(each.items, "question")})</option>
          `,
          )}
          <option value=${OWN}>my own: paste or drop</option>
        </select>
      </label>
      ${
        source.set === OWN
          ? html`<${OwnQuestions} text=${source.text} faults=${faults}
            onChange=${(text) => onChange({ set: OWN, text })} />
            <${KeepSet} text=${source.text} onKept=${kept} />`
          : html`<p class="hint">Or drop a file of JSON Lines here.</p>
            ${
              chosen && chosen.source !== "store" &&
              html`<${DeleteSet} key=${chosen.name} set=${chosen} onDeleted=${deleted} />`
            }`
      }
    </div>
  `;
}

function OwnQuestions({ text, faults, onChange }) {
  const { questions, errors } = readLines(text);
  const pick = async (event) => {
    const [file] = event.target.files;
    if (file) onChange(await file.text());
  };
  const told = [...errors.map(({ line, message }) => `line ${line}: ${message}`), ...faults];
  return html`
    <label>Questions, one a line as JSON
      <textarea class="mono" rows="7" spellcheck="false" value=${text} wrap="off"
        aria-invalid=${told.length > 0} aria-describedby="question-faults"
        onInput=${(event) => onChange(event.target.value)}></textarea>
    </label>
    <div class="row">
      <label class="button small">Choose a file
        <input class="hidden" type="file" accept=".jsonl,.ndjson,.json,.txt" onChange=${pick} />
      </label>
      <button type="button" class="small" onClick=${() => onChange(EXAMPLE_LINES)}>Insert an example</button>
      <span class="hint" aria-live="polite">${count(questions.length, "question")}</span>
    </div>
    <div id="question-faults" role="alert">
      ${
        told.length > 0 &&
        html`
        <ul class="faults">
          ${told.slice(0, MAX_TOLD).map((each) => html`<li>${each}</li>`)}
          ${told.length > MAX_TOLD && html`<li>and ${told.length - MAX_TOLD} more</li>`}
        </ul>
      `
      }
    </div>
  `;
}
