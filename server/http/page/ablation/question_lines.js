// A question set as text: JSON Lines, one question a line. The server judges the questions; here
// its words find their line.

const EXAMPLE = [
  {
    id: "q1",
    task: "medical",
    question: 'Which ICD-10-CM chapter covers "Cholera"?',
    answers: ["infectious diseases"],
  },
  {
    id: "q2",
    task: "medical",
    question: 'Which ICD-10-CM chapter covers "Asthma"?',
    answers: ["respiratory diseases"],
  },
];
export const EXAMPLE_LINES = EXAMPLE.map((question) => JSON.stringify(question)).join("\n");

const PLACE = /questions(?:\[(\d+)\]|\.(\d+))(?=[.\s:]|$)\.?/g;

/**
 * {questions, lines, errors}: the questions of a text, the line number of each, and what is wrong
 * with lines that are no JSON object, as {line, message}.
 */
export function readLines(text) {
  const found = { questions: [], lines: [], errors: [] };
  text
    .replace(/^\ufeff/, "")
    .split("\n")
    .forEach((line, index) => {
      if (!line.trim()) return;
      try {
        found.questions.push(readObject(line));
        found.lines.push(index + 1);
      } catch (error) {
        found.errors.push({ line: index + 1, message: error.message });
      }
    });
  return found;
}

function readObject(line) {
  const value = JSON.parse(line);
  if (value === null || typeof value !== "object" || Array.isArray(value)) {
    throw new Error('A line is one question: {"id": …, "task": …, "question": …, "answers": […]}');
  }
  return value;
}

/** The server's words about a set, with lines in place of indices. */
export function withLines(message, lines) {
  return message.replace(PLACE, (_, bracketed, dotted) => `line ${lines[bracketed ?? dotted]} `);
}

/** What the server said, of the lines that hold what it refused (an unknown task, say). */
export function linesNaming(error, { questions, lines }) {
  if (error.field !== "task") return [];
  return lines.filter((_, index) => error.message.includes(`'${questions[index].task}'`));
}
