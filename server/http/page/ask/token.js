// What is known of one token: its log-probability, and the likeliest tokens in its place.

import { html } from "../html.js";
import { fixed, percent } from "../number.js";

/** A text in which spaces and line breaks can be seen. */
export function visible(text) {
  if (text === "") return "(part of a character)";
  return text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

/** The panel below an answer. It has its place from the start, so that nothing moves. */
export function TokenPanel({ token }) {
  if (!token || token.logprob == null) {
    return html`<div class="token-panel hint">Point at a token, or press an arrow key in the answer: its
      log-probability and the five likeliest tokens.</div>`;
  }
  return html`
    <div class="token-panel" aria-live="polite">
      <p><code>${visible(token.text)}</code> log-probability ${fixed(token.logprob, 3)},
        probability ${percent(Math.exp(token.logprob), 1)}</p>
      <ol>
        ${token.top.map(
          (each) => html`
            <li class=${each.token === token.text ? "own" : ""}>
              <code>${visible(each.token)}</code>
              <span class="bar"><span style=${{ width: `${Math.exp(each.logprob) * 100}%` }}></span></span>
              <span class="figure">${fixed(each.logprob, 3)}</span>
            </li>
          `,
        )}
      </ol>
    </div>
  `;
}
