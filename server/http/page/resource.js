// What a tab reads from the server when it opens, and again when it is asked to.

import { useCallback, useEffect, useState } from "preact/hooks";

/**
 * The state {value, error, isLoading, reload} of what `load(signal)` returns. It is loaded again
 * when one of `keys` changes; until then the old value stays, so that nothing jumps.
 */
export function useResource(load, keys = []) {
  const [state, setState] = useState({ value: null, error: null, isLoading: true });
  const [round, setRound] = useState(0);
  useEffect(() => {
    const control = new AbortController();
    setState((old) => ({ ...old, isLoading: true }));
    load(control.signal).then(
      (value) => setState({ value, error: null, isLoading: false }),
      (error) => {
        if (error.name !== "AbortError") {
          setState((old) => ({ ...old, error, isLoading: false }));
        }
      },
    );
    return () => control.abort();
  }, [...keys, round]);
  const reload = useCallback(() => setRound((number) => number + 1), []);
  return { ...state, reload };
}
