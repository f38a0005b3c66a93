// The tab Ask: a question, and its answer or the answers of the four variants.

import { useEffect, useRef, useState } from "preact/hooks";

import { html } from "../html.js";
import { Answer } from "./answer.js";
import { ask, EMPTY, isRunning } from "./answer_stream.js";
import { AskForm } from "./form.js";
import { formatInWords } from "./prompt_format.js";

const NARROW = matchMedia("(max-width: 60rem)"); // answers are below the form, out of sight

/** The tab. */
export function Ask({ adapters }) {
  const [asked, setAsked] = useState([]); // {name, body, answer} each
  const [referenceName, setReferenceName] = useState("task+crma");
  const control = useRef(null);
  const answers = useRef(null);
  useEffect(() => () => control.current?.abort(), []);
  useEffect(() => {
    if (asked.length > 0 && NARROW.matches) answers.current.scrollIntoView();
  }, [asked[0]?.body]);
  const start = (requests) => {
    control.current?.abort();
    const mine = new AbortController();
    control.current = mine;
    setAsked(requests.map((each) => ({ ...each, answer: EMPTY })));
    // All are sent at once, so that they run in one batch.
    requests.forEach((request, index) => {
      ask(request.body, mine.signal, (answer) => {
        if (control.current === mine) setAsked((all) => replaced(all, index, answer));
      });
    });
  };
  const isBusy = asked.some((each) => isRunning(each.answer));
  const reference = asked.find((each) => each.name === referenceName) ?? asked.at(-1);
  const isCompared = asked.length > 1;
  return html`
    <div class="ask">
      <h2 class="hidden">Ask</h2>
      <${AskForm} adapters=${adapters} isBusy=${isBusy} onAsk=${start}
        onStop=${() => control.current?.abort()} />
      <section ref=${answers} class="answers" aria-label="Answers">
        ${
          asked.length === 0 &&
          html`<p class="hint empty">The answer will be here, token by token. Compare shows what the task and
            CRMA change.</p>`
        }
        ${
          isCompared &&
          html`
          <label class="reference">Mark where the others part from
            <select value=${reference.name} onChange=${(event) => setReferenceName(event.target.value)}>
              ${asked.map((each) => html`<option>${each.name}</option>`)}
            </select>
          </label>
        `
        }
        ${
          asked.length > 0 &&
          html`<p class="hint format">${formatInWords(asked, adapters.value?.tasks ?? [])}</p>`
        }
        <div class="grid">
          ${asked.map(
            (each) => html`
              <${Answer} key=${each.name} asked=${each} reference=${isCompared ? reference : null} />
            `,
          )}
        </div>
      </section>
    </div>
  `;
}

function replaced(all, index, answer) {
  return all.map((each, i) => (i === index ? { ...each, answer } : each));
}
