// A background ablation while it runs, and its result.

import { useEffect, useState } from "preact/hooks";

import { get, stream } from "../api.js";

export const ENDED = ["done", "failed", "cancelled", "interrupted"];
const AGAIN_MS = 500;

/** {job, error} of an id: followed to its end, again after a connection that was lost. */
export function useJob(id) {
  const [state, setState] = useState({ job: null, error: null });
  useEffect(() => {
    const control = new AbortController();
    setState({ job: null, error: null });
    follow(id, control.signal, (change) => setState((old) => ({ ...old, ...change })));
    return () => control.abort();
  }, [id]);
  return state;
}

async function follow(id, signal, set) {
  const path = `ablation/${encodeURIComponent(id)}`;
  while (!signal.aborted) {
    try {
      const job = await get(path, signal);
      set({ job, error: null });
      if (ENDED.includes(job.status)) return;
      for await (const { event, data } of stream("GET", `${path}/events`, { signal })) {
        if (event === "progress") set({ job: { ...job, progress: data }, error: null });
      }
    } catch (error) {
      if (error.name === "AbortError") return;
      set({ error });
      if (error.status >= 400 && error.status < 500) return;
    }
    await pause(AGAIN_MS);
  }
}

function pause(time) {
  return new Promise((resolve) => setTimeout(resolve, time));
}
