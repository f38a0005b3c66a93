// The text of an answer, token by token.

import { useEffect, useRef } from "preact/hooks";

import { html } from "../html.js";

const STEPS = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 };
const ATTRIBUTE = "data-index";

/**
 * The text of `answer`, which scrolls within its own box. `chosen` is the index of the token that
 * the panel shows; `onChoose(index)` changes it. `marked` is where it parts from another answer.
 */
export function TokenText({ answer, label, chosen, marked, onChoose }) {
  const box = useRef(null);
  const { tokens } = answer;
  useEffect(() => {
    const element = box.current;
    if (answer.status === "streaming") element.scrollTop = element.scrollHeight;
  }, [tokens.length]);
  const step = (event) => {
    const by = STEPS[event.key];
    if (by === undefined || tokens.length === 0) return;
    event.preventDefault();
    const next = chosen === null ? 0 : chosen + by;
    onChoose(Math.max(0, Math.min(tokens.length - 1, next)));
  };
  const point = (event) => {
    const index = event.target.getAttribute(ATTRIBUTE);
    if (index !== null) onChoose(Number(index));
  };
  return html`
    <div class="answer-text" ref=${box} role="group" tabindex="0" aria-label=${label}
      aria-busy=${answer.status === "streaming"} onKeyDown=${step} onMouseOver=${point} onClick=${point}>
      ${tokens.map((token, index) => {
        const names = ["token"];
        if (index === chosen) names.push("chosen");
        if (index === marked) names.push("parts");
        return html`<span class=${names.join(" ")} data-index=${index}>${token.text}</span>`;
      })}
      ${marked !== null && marked >= tokens.length && html`<span class="token parts">∎</span>`}
    </div>
  `;
}
