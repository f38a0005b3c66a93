// What the charts show: values of /metrics as they are, and rates between two readings.

import { total } from "./metrics.js";

const KEPT = 150; // readings; five minutes of them

const GAUGES = {
  running: "crma_num_requests_running",
  waiting: "crma_num_requests_waiting",
  kv: "crma_kv_cache_usage_perc",
};
const COUNTERS = {
  prompt: "crma_prompt_tokens_total",
  generated: "crma_generation_tokens_total",
  finished: "crma_request_success_total",
};
const TTFT = "crma_time_to_first_token_seconds";

/** A point from the samples of a reading at `time` in seconds; `last` is the point before, or null. */
export function pointOf(samples, time, last) {
  const point = { time, counted: {} };
  for (const [name, metric] of Object.entries(GAUGES)) point[name] = total(samples, metric);
  for (const [name, metric] of Object.entries(COUNTERS)) {
    point.counted[name] = total(samples, metric);
    point[name] = rate(point, last, name);
  }
  point.counted.ttft = total(samples, `${TTFT}_sum`);
  point.counted.first = total(samples, `${TTFT}_count`);
  const firsts = last && point.counted.first - last.counted.first;
  point.ttft = firsts > 0 ? (point.counted.ttft - last.counted.ttft) / firsts : null;
  return point;
}

/** A second's growth since the last reading; null without one, or after a restart of the server. */
function rate(point, last, name) {
  if (last === null) return null;
  const grown = point.counted[name] - last.counted[name];
  return grown < 0 ? null : grown / (point.time - last.time);
}

/** The points with one more, without those that are too old. */
export function withPoint(points, point) {
  return [...points, point].slice(-KEPT);
}
