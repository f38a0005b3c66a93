// What the numbers of a comparison mean, for someone who knows no statistics.

import { count, fixed, points, pValue } from "../number.js";

const ALPHA = 0.05; // at which the server decides

/** Sentences about a comparison of judged answers. `margin` is the run's. */
export function comparisonInWords(comparison, margin) {
  const { a, b, n, mcnemar, detectable_difference: detectable } = comparison;
  if (!n) return ["No question was scored under both."];
  const { gained, lost, p } = mcnemar;
  const said = [differenceInWords(comparison)];
  if (gained + lost === 0) said.push("No question was answered right by only one of the two.");
  else
    said.push(
      `${count(gained, "question")} only ${a} got right, ${count(lost, "question")} only ${b}. ${luckInWords(p)}`,
    );
  said.push(powerInWords(detectable, count(n, "question")));
  if (comparison.equivalent_within_margin) {
    said.push(
      `They are equivalent: their difference is less than ${points(margin, 1).slice(1)} points.`,
    );
  }
  return said;
}

/** Sentences about a comparison of log-probabilities. */
export function perplexityInWords({
  a,
  b,
  n,
  difference,
  bootstrap,
  detectable_difference: detectable,
}) {
  if (difference == null) return ["No question was scored under both."];
  const said = [`${a} gives the answers ${signed(difference)} nats a token compared with ${b}.`];
  if (bootstrap) said.push(`95 % interval: ${signed(bootstrap[0])} to ${signed(bootstrap[1])}.`);
  if (detectable != null) {
    said.push(
      `80 of 100 runs with ${count(n, "question")} would see a difference of ${fixed(detectable, 3)} nats.`,
    );
  }
  return said;
}

function differenceInWords({ a, b, n, difference, bootstrap }) {
  const interval = bootstrap
    ? ` (95 % interval ${points(bootstrap[0])} to ${points(bootstrap[1])})`
    : "";
  return `Of ${count(n, "question")}, ${a} gets ${points(difference)} points compared with ${b}${interval}.`;
}

function luckInWords(p) {
  const chance = chanceInWords(p);
  const told = `If the two were equally good, a split at least as uneven would come up in ${chance}`;
  const verdict = p <= ALPHA ? "hardly chance" : "it may well be chance";
  return `${told}: ${verdict} (McNemar's exact p ${p < 0.001 ? "" : "= "}${pValue(p)}).`;
}

function chanceInWords(p) {
  if (p < 0.001) return "fewer than 1 of 1,000 runs";
  return p < 0.01 ? `${fixed(p * 1000, 0)} of 1,000 runs` : `${fixed(p * 100, 0)} of 100 runs`;
}

function powerInWords(detectable, size) {
  if (detectable == null) return `${size} are too few to find any difference.`;
  const seen = `a difference of ${points(detectable).slice(1)} points`;
  return `80 of 100 runs with ${size} would see ${seen}; a smaller one may be missed.`;
}

function signed(nats) {
  return (nats > 0 ? "+" : "") + fixed(nats, 3);
}
