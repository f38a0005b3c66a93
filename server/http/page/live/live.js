// The tab Live: what the server does now, from /metrics.

import { useEffect, useRef, useState } from "preact/hooks";

import { html } from "../html.js";
import { fixed, percent, seconds } from "../number.js";
import { Problem } from "../problem.js";
import { Chart } from "./chart.js";
import { pointOf, withPoint } from "./history.js";
import { readMetrics } from "./metrics.js";

const EVERY_MS = 2000;

/** The tab. */
export function Live() {
  const { points, samples, error } = useMetrics();
  const number = (value) => fixed(value, value < 10 && value % 1 ? 1 : 0);
  return html`
    <h2>Live</h2>
    <p class="hint">Read from <a href="metrics">/metrics</a> every two seconds while this tab is open.</p>
    <${Problem} error=${error} />
    <div class="charts">
      <${Chart} title="Requests" points=${points} show=${number} least=${1} series=${[
        { name: "running", label: "running", colour: "--accent" },
        { name: "waiting", label: "in the queue", colour: "--other" },
      ]} />
      <${Chart} title="Tokens a second" points=${points} show=${number} least=${1} series=${[
        { name: "generated", label: "generated", colour: "--accent" },
        { name: "prompt", label: "of prompts", colour: "--crma" },
      ]} />
      <${Chart} title="Time to first token, mean" points=${points} show=${seconds} least=${0.1} series=${[
        { name: "ttft", label: "of the latest requests", colour: "--accent", isSparse: true },
      ]} />
      <${Chart} title="KV cache in use" points=${points} show=${(share) => percent(share)} max=${1} series=${[
        { name: "kv", label: "of its blocks", colour: "--accent" },
      ]} />
      <${Chart} title="Requests finished a second" points=${points} show=${number} least=${1} series=${[
        { name: "finished", label: "finished", colour: "--accent" },
      ]} />
      <${Residents} samples=${samples} />
    </div>
  `;
}

function Residents({ samples }) {
  const rows = samples.filter((each) => each.name === "crma_adapter_resident");
  return html`
    <section class="card" aria-labelledby="residents-heading">
      <h3 id="residents-heading">Adapters in memory</h3>
      ${samples.length > 0 && rows.length === 0 && html`<p class="hint">No task serves.</p>`}
      <ul class="residents">
        ${rows.map(
          ({ labels, value }) => html`
          <li class=${value ? "in" : ""}>
            ${labels.adapter}${" "}<span class="hint">${value ? "in memory" : "not loaded"}</span>
          </li>
        `,
        )}
      </ul>
    </section>
  `;
}

/** {points, samples, error}, read again and again while the browser shows the page. */
function useMetrics() {
  const [state, setState] = useState({ points: [], samples: [], error: null });
  const last = useRef(null);
  useEffect(() => {
    const control = new AbortController();
    const read = async () => {
      if (document.hidden) return;
      try {
        const samples = await readMetrics(control.signal);
        const point = pointOf(samples, Date.now() / 1000, last.current);
        last.current = point;
        setState(({ points }) => ({ points: withPoint(points, point), samples, error: null }));
      } catch (error) {
        if (error.name !== "AbortError") setState((old) => ({ ...old, error }));
      }
    };
    read();
    const timer = setInterval(read, EVERY_MS);
    return () => {
      clearInterval(timer);
      control.abort();
    };
  }, []);
  return state;
}
