// The texts of the questions of a result, which names them by id.

import { send } from "../api.js";
import { readLines } from "./question_lines.js";

/** Id -> text: from the request, or from the set that it names, if that is still there. */
export async function questionTexts(request, result, signal) {
  if (request.questions) return textsOf(request.questions, result);
  const path = `question_sets/${encodeURIComponent(request.question_set)}`;
  const lines = await (await send("GET", path, { signal })).text();
  return textsOf(readLines(lines).questions, result);
}

/** A set may have been replaced since: a question counts if its answers are those of the result. */
function textsOf(questions, { items }) {
  const asked = new Map(items.map((item) => [item.id, item.answers.join("\n")]));
  const same = questions.filter((each) => asked.get(each.id) === each.answers.join("\n"));
  return new Map(same.map((each) => [each.id, each.question]));
}
