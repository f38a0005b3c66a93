// Numbers as the page shows them. It rounds what the server computed, and computes nothing itself.

const MINUS = "\u2212";

/** A number with so many digits after the point. */
export function fixed(number, digits) {
  const text = Math.abs(number).toFixed(digits);
  const isZero = Number(text) === 0;
  return number < 0 && !isZero ? MINUS + text : text;
}

/** A share from 0 to 1 as a percentage. */
export function percent(share, digits = 0) {
  return share == null ? "–" : `${fixed(share * 100, digits)} %`;
}

/** A difference of shares in points, with its sign. */
export function points(difference, digits = 0) {
  if (difference == null) return "–";
  const sign = difference > 0 ? "+" : "";
  return sign + fixed(difference * 100, digits);
}

/** A p-value. */
export function pValue(p) {
  if (p == null) return "–";
  return p < 0.001 ? "< 0.001" : fixed(p, 3);
}

/** Seconds. */
export function seconds(time) {
  if (time < 1) return `${Math.round(time * 1000)} ms`;
  return `${fixed(time, time < 10 ? 2 : 0)} s`;
}

/** A count with its noun: 1 token, 2 tokens. */
export function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

/** The start of a digest, enough to tell two apart by eye. */
export function short(digest) {
  return digest == null ? "none" : digest.replace(/^sha256:/, "").slice(0, 12);
}

/** A time of the server in the user's zone. */
export function when(iso) {
  return new Date(iso).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
}
