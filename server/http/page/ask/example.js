// A question to begin with: one that the server's question sets ask of a task.

import { useState } from "preact/hooks";

import { get } from "../api.js";
import { html } from "../html.js";
import { Problem } from "../problem.js";

/** A button; `onFound(text)` is called with a question for `task`, "": for any. */
export function ExampleButton({ task, onFound }) {
  const [state, setState] = useState({ error: null, told: "" });
  const insert = async () => {
    try {
      const text = await exampleFor(task);
      const told = text === null ? `No question set here asks ${task || "anything"}.` : "";
      setState({ error: null, told });
      if (text !== null) onFound(text);
    } catch (error) {
      setState({ error, told: "" });
    }
  };
  return html`
    <div class="row">
      <button type="button" class="small" onClick=${insert}>Insert an example</button>
      <span class="hint" role="status">${state.told}</span>
    </div>
    <${Problem} error=${state.error} />
  `;
}

async function exampleFor(task) {
  const { questionsOf } = await import("../ablation/question_texts.js"); // few need an example
  for (const { name } of await get("question_sets")) {
    const questions = await questionsOf({ set: name });
    const found = questions.find((each) => !task || each.task === task);
    if (found) return found.question;
  }
  return null;
}
