// What to ask, whom, and how.

import { useRef, useState } from "preact/hooks";

import { CheckField } from "../field.js";
import { html } from "../html.js";
import { ExampleButton } from "./example.js";
import { FormatField, formatOf } from "./prompt_format.js";
import { readSampling, Sampling } from "./sampling.js";
import { selectionOf, VARIANTS } from "./variant.js";

const SHOWN = { stream: true, logprobs: true, top_logprobs: 5 };
const CRMA = { auto: null, on: true, off: false };

/** The form. `onAsk(requests)` is called with a list of {name, body}. */
export function AskForm({ adapters, isBusy, onAsk, onStop }) {
  const tasks = adapters.value?.tasks ?? [];
  const [task, setTask] = useState(null);
  const [isCompared, setCompared] = useState(false);
  const prompt = useRef(null);
  const insert = (text) => {
    prompt.current.value = text;
    prompt.current.focus();
  };
  const chosen = task ?? tasks[0]?.name ?? "";
  const chosenTask = tasks.find((each) => each.name === chosen);
  const submit = (event) => {
    event.preventDefault();
    onAsk(readForm(new FormData(event.target), chosen, isCompared));
  };
  return html`
    <form class="ask-form" onSubmit=${submit} aria-label="Question">
      <label for="prompt">Prompt</label>
      <textarea id="prompt" name="prompt" rows="5" required placeholder="Your question"
        ref=${prompt} onKeyDown=${sendByKey}></textarea>
      <${ExampleButton} task=${chosen} onFound=${insert} />
      <label>Task
        <select value=${chosen} onChange=${(event) => setTask(event.target.value)}>
          ${tasks.map((each) => html`<option value=${each.name}>${each.name} (${each.version})</option>`)}
          <option value="">none: the base model</option>
        </select>
      </label>
      <fieldset>
        <legend>CRMA backbone</legend>
        ${Object.keys(CRMA).map(
          (name) => html`
            <label class="check">
              <input type="radio" name="crma" value=${name} defaultChecked=${name === "auto"}
                disabled=${isCompared} /> ${name}
            </label>
          `,
        )}
        <p class="hint">auto: as the task was trained.</p>
      </fieldset>
      <${CheckField} label="Compare: base, crma, task and task+crma side by side"
        onChange=${(event) => setCompared(event.target.checked)} />
      ${isCompared && chosenTask && html`<${FormatField} task=${chosenTask} />`}
      <${Sampling} />
      <div class="row">
        <button class="main">${isCompared ? "Compare" : "Ask"}</button>
        <button type="button" disabled=${!isBusy} onClick=${onStop}>Stop</button>
        <span class="hint only-desk">or Ctrl + Enter</span>
      </div>
    </form>
  `;
}

/** The requests that a filled form asks for. */
function readForm(data, task, isCompared) {
  const body = { prompt: data.get("prompt"), ...readSampling(data), ...SHOWN };
  if (!isCompared) {
    const crma = CRMA[data.get("crma")];
    return [{ name: task || "base", body: { ...body, task: task || null, crma } }];
  }
  // One seed for all: what differs is then the model, not the draw.
  if (body.temperature && body.seed === undefined) body.seed = drawnSeed();
  const shared = formatOf(data, task);
  if (shared) body.format_of = shared;
  const variants = task ? VARIANTS : VARIANTS.filter((name) => !name.startsWith("task"));
  return variants.map((name) => ({ name, body: { ...body, ...selectionOf(name, task) } }));
}

function drawnSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

function sendByKey(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    event.target.form.requestSubmit();
  }
}
