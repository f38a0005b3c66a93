// Which tasks of a question set are asked.

import { useState } from "preact/hooks";

import { CheckField } from "../field.js";
import { html } from "../html.js";
import { count } from "../number.js";
import { Problem } from "../problem.js";
import { useResource } from "../resource.js";
import { questionsOf } from "./question_texts.js";

/** Boxes for the tasks of `source`, {set, text}; its questions are read once it is opened. */
export function TaskFilter({ source }) {
  const [wasOpened, setOpened] = useState(false); // what was ticked stays when it is closed
  const found = useResource(
    async (signal) => (wasOpened ? numbersByTask(await questionsOf(source, signal)) : []),
    [wasOpened, source.set, source.text],
  );
  return html`
    <details onToggle=${() => setOpened(true)}>
      <summary>Only some tasks</summary>
      <fieldset>
        <legend>None ticked: all of them</legend>
        ${found.value?.map(
          ([task, number]) => html`
          <${CheckField} key=${task} name="task" value=${task}
            label="${task} (${count(number, "question")})" />
        `,
        )}
      </fieldset>
      <${Problem} error=${found.error} />
    </details>
  `;
}

function numbersByTask(questions) {
  const numbers = new Map();
  for (const { task } of questions) {
    if (typeof task === "string") numbers.set(task, (numbers.get(task) ?? 0) + 1);
  }
  return [...numbers];
}
