// The questions of a set, and the texts of those of a result, which names them by id.

import { send } from "../api.js";
import { readLines } from "./question_lines.js";

/** The questions of a source {set, text}: of a set of the server, or of a text. */
export async function questionsOf({ set, text }, signal) {
  if (!set) return readLines(text).questions;
  const path = `question_sets/${encodeURIComponent(set)}`;
  return readLines(await (await send("GET", path, { signal })).text()).questions;
}

/** Id -> text: from the request, or from the set that it names, if that is still there. */
export async function questionTexts(request, result, signal) {
  const asked = request.questions ?? (await questionsOf({ set: request.question_set }, signal));
  return textsOf(asked, result);
}

/** A set may have been replaced since: a question counts if its answers are those of the result. */
function textsOf(questions, { items }) {
  const asked = new Map(items.map((item) => [item.id, item.answers.join("\n")]));
  const same = questions.filter((each) => asked.get(each.id) === each.answers.join("\n"));
  return new Map(same.map((each) => [each.id, each.question]));
}
