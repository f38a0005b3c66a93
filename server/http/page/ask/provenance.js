// What exactly answered, as the answer itself says it.

import { html } from "../html.js";
import { count, seconds } from "../number.js";

const ENDS = { stop: "the model or a stop text", length: "the limit of tokens" };

/** The end of a stream: digests, sizes and times, on a click. */
export function Provenance({ end }) {
  const { provenance, usage, timings } = end;
  const rows = [
    ["Base model", provenance.base],
    ["Task adapter", provenance.task ?? "none"],
    ["CRMA backbone", provenance.crma ?? "off"],
    ["Engine", provenance.engine],
    ["Type", provenance.dtype],
    ["Seed", provenance.seed ?? "none: nothing was drawn"],
    ["Prompt", `${count(usage.prompt_tokens, "token")}, ${usage.cached_tokens} of them cached`],
    ["Answer", count(usage.completion_tokens, "token")],
    ["Ended by", ENDS[end.finish_reason] ?? end.finish_reason],
    ["Waited in the queue", seconds(timings.queue_s)],
    ["First token after", seconds(timings.ttft_s)],
    ["All after", seconds(timings.e2e_s)],
    ["Id", end.id],
  ];
  return html`
    <details class="provenance">
      <summary>Provenance</summary>
      <dl>
        ${rows.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}
      </dl>
    </details>
  `;
}
