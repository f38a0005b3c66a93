// Where two answers part.

import { count } from "../number.js";

/**
 * The index of the first token in which `answer` differs from `reference`; null while there is
 * none. An answer that ends earlier than the other parts at its end.
 */
export function partsAt(answer, reference) {
  const length = Math.min(answer.tokens.length, reference.tokens.length);
  for (let i = 0; i < length; i += 1) {
    if (answer.tokens[i].text !== reference.tokens[i].text) return i;
  }
  const both = answer.status === "done" && reference.status === "done";
  return both && answer.tokens.length !== reference.tokens.length ? length : null;
}

/** What to say of it. */
export function partingInWords(answer, reference, name) {
  const at = partsAt(answer, reference);
  if (at !== null)
    return at === 0 ? `Differs from ${name} at once` : `As ${name} for ${count(at, "token")}`;
  const both = answer.status === "done" && reference.status === "done";
  return both ? `The same as ${name}` : "";
}
