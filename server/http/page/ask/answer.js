// One answer: its text, what its tokens say, how it ended.

import { useState } from "preact/hooks";

import { html } from "../html.js";
import { count, seconds } from "../number.js";
import { Problem } from "../problem.js";
import { isRunning } from "./answer_stream.js";
import { partingInWords, partsAt } from "./parting.js";
import { Provenance } from "./provenance.js";
import { Snippets } from "./snippet.js";
import { TokenPanel } from "./token.js";
import { TokenText } from "./token_text.js";

/**
 * Shows {name, body, answer}. `reference`, if there is one, is the asked one that this one is
 * compared with.
 */
export function Answer({ asked, reference }) {
  const [chosen, setChosen] = useState(null);
  const { name, body, answer } = asked;
  const isCompared = reference && reference !== asked;
  const marked = isCompared ? partsAt(answer, reference.answer) : null;
  return html`
    <article class="answer" data-variant=${name} aria-label="Answer of ${name}">
      <div class="row">
        <h3><span class="swatch" aria-hidden="true"></span>${name}</h3>
        <p class="state" role="status">${stateInWords(answer)}</p>
      </div>
      <${TokenText} answer=${answer} label="Text of ${name}" chosen=${chosen} marked=${marked}
        onChoose=${setChosen} />
      ${
        reference &&
        html`
        <p class="parting">
          ${isCompared
            ? partingInWords(answer, reference.answer, reference.name)
            : "The others are compared with this one"}
        </p>
      `
      }
      <${Problem} error=${answer.error} />
      <${TokenPanel} token=${chosen === null ? null : answer.tokens[chosen]} />
      <div class="more">
        ${answer.end ? html`<${Provenance} end=${answer.end} />` : html`<div class="placeholder"></div>`}
        <${Snippets} body=${body} />
      </div>
    </article>
  `;
}

function stateInWords(answer) {
  if (answer.status === "waiting") return "waiting";
  if (isRunning(answer)) return "answering";
  if (answer.status === "stopped") return "stopped";
  if (answer.status === "failed") return "failed";
  const { usage, timings, finish_reason: reason } = answer.end;
  const cut = reason === "length" ? ", cut off" : "";
  return `${count(usage.completion_tokens, "token")} in ${seconds(timings.e2e_s)}${cut}`;
}
