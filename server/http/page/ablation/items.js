// Every question with every variant's answer, filtered.

import { useState } from "preact/hooks";

import { html } from "../html.js";
import { count, fixed } from "../number.js";
import { KINDS, kindOf } from "./flips.js";

const PAGE = 50;

/** `questions` maps ids to texts, as far as they are known. */
export function Items({ items, comparison, questions, kind, onKind }) {
  const [task, setTask] = useState("");
  const [text, setText] = useState("");
  const [numShown, setNumShown] = useState(PAGE);
  const tasks = [...new Set(items.map((item) => item.task))];
  const isJudged = Boolean(comparison?.table);
  const found = items.filter(
    (item) =>
      (!task || item.task === task) &&
      (!kind || !isJudged || kindOf(item, comparison) === kind) &&
      (!text || textOf(item, questions).includes(text.toLowerCase())),
  );
  return html`
    <section aria-labelledby="items-heading">
      <h3 id="items-heading">Questions</h3>
      <div class="filters">
        ${
          isJudged &&
          html`
          <label>Show
            <select value=${kind ?? ""} onChange=${(event) => onKind(event.target.value || null)}>
              <option value="">all</option>
              ${[...KINDS, ["unscored", null, "not scored"]].map(
                ([name, , label]) => html`<option value=${name}>${label}</option>`,
              )}
            </select>
          </label>
        `
        }
        <label>Task
          <select value=${task} onChange=${(event) => setTask(event.target.value)}>
            <option value="">all</option>
            ${tasks.map((name) => html`<option>${name}</option>`)}
          </select>
        </label>
        <label class="grow">Text
          <input type="search" value=${text} onInput=${(event) => setText(event.target.value)} />
        </label>
        <p class="hint" role="status">${count(found.length, "question")}</p>
      </div>
      <ol class="items">
        ${found.slice(0, numShown).map(
          (item) => html`
          <${Item} key=${item.id} item=${item} question=${questions.get(item.id)} />
        `,
        )}
      </ol>
      ${
        found.length > numShown &&
        html`
        <button type="button" onClick=${() => setNumShown(numShown + PAGE)}>Show ${PAGE} more</button>
      `
      }
    </section>
  `;
}

function textOf(item, questions) {
  const outputs = Object.values(item.outputs).map((output) => output.text ?? "");
  return [item.id, questions.get(item.id) ?? "", ...item.answers, ...outputs]
    .join("\n")
    .toLowerCase();
}

function Item({ item, question }) {
  return html`
    <li class="item">
      <p class="question"><span class="hint">${item.id} · ${item.task}</span> ${question}</p>
      <p class="right">Right answer: ${item.answers.join(" · ")}</p>
      <dl>
        ${Object.entries(item.outputs).map(
          ([name, output]) => html`
          <div data-variant=${name}>
            <dt><span class="swatch" aria-hidden="true"></span>${name}</dt>
            <dd><span class="verdict ${verdict(output)}">${verdict(output)}</span> ${output.text}
              ${output.error && html`<span class="hint"> ${output.error}</span>`}</dd>
          </div>
        `,
        )}
      </dl>
    </li>
  `;
}

function verdict({ correct, status, logprob_per_token: nats }) {
  if (status) return status.replace("_", " ");
  if (correct === undefined) return `${fixed(nats, 3)} nats`;
  return correct ? "right" : "wrong";
}
