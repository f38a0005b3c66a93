// A share with its interval, drawn: the bar is the share, the line is where it may really be.

import { html } from "../html.js";

const WIDTH = 100;
const HEIGHT = 12;

/** `share` and `interval` [low, high] from 0 to 1; the numbers stand beside it as text. */
export function Bar({ share, interval }) {
  const [low, high] = interval ?? [share, share];
  const x = (value) => value * WIDTH;
  return html`
    <svg class="interval" viewBox="0 0 ${WIDTH} ${HEIGHT}" preserveAspectRatio="none" aria-hidden="true">
      <rect class="ground" width=${WIDTH} height=${HEIGHT} />
      <rect class="share" width=${x(share ?? 0)} height=${HEIGHT} />
      ${
        share !== null &&
        html`
        <path class="whisker" vector-effect="non-scaling-stroke"
          d="M${x(low)} 2V10M${x(low)} 6H${x(high)}M${x(high)} 2V10" />
      `
      }
    </svg>
  `;
}
