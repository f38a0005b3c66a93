// An answer while it arrives, as a value that changes: what an answer shows is a function of it.
//
// status: waiting, streaming, done, stopped (by the user) or failed. tokens: text, logprob, top.

import { ApiError, CUT_OFF, stream } from "../api.js";

export const EMPTY = { status: "waiting", tokens: [], end: null, error: null };

/** Whether more may come. */
export function isRunning(answer) {
  return answer.status === "waiting" || answer.status === "streaming";
}

/** The answer's whole text so far. */
export function textOf(answer) {
  return answer.tokens.map((token) => token.text).join("");
}

/** Ask for `body` and call `onChange(answer)` as the answer grows. Throws nothing. */
export async function ask(body, signal, onChange) {
  let answer = EMPTY;
  const set = (change) => {
    answer = { ...answer, ...change };
    onChange(answer);
  };
  set({});
  try {
    for await (const { event, data } of stream("POST", "generate", { body, signal })) {
      if (event === "token") {
        set({ status: "streaming", tokens: [...answer.tokens, readToken(data)] });
      } else if (event === "done") {
        set({ status: "done", end: data });
      } else if (event === "error") {
        throw new ApiError(data.error.message, data.error);
      }
    }
    if (answer.status !== "done") throw new ApiError(CUT_OFF);
  } catch (error) {
    if (error.name === "AbortError") set({ status: "stopped" });
    else set({ status: "failed", error });
  }
}

function readToken({ text, logprob, top_logprobs: top }) {
  return { text, logprob, top: top ?? [] };
}
