// The certificate of the backbone, layer by layer: what a layer may at most do, and what it does.

import { html } from "../html.js";
import { fixed } from "../number.js";
import { Scroll } from "../scroll.js";

const WIDTH = 640;
const HEIGHT = 200;
const LEFT = 34;
const TOP = 8;
const BOTTOM = 24;

const HOLDS =
  "The certificate holds: no layer can stretch what goes through it by more than its bound.";

/** `layers` have bound and norm each. */
export function Certificate({ certificate }) {
  const { layers, holds } = certificate;
  const top = Math.max(...layers.map((layer) => layer.bound)) * 1.08;
  const step = (WIDTH - LEFT) / layers.length;
  const y = (value) => TOP + (HEIGHT - BOTTOM - TOP) * (1 - value / top);
  const tick = tickOf(top);
  const ticks = Array.from({ length: Math.floor(top / tick) + 1 }, (_, index) => index * tick);
  const digits = Math.max(0, -Math.floor(Math.log10(tick)));
  return html`
    <p>${holds ? HOLDS : "The certificate does not hold."}
      ${" "}Largest bound ${fixed(certificate.max_bound, 3)}, largest norm measured
      ${" "}${fixed(certificate.max_norm, 3)}.</p>
    <${Scroll} label="Plot of bounds and norms by layer">
    <svg class="certificate" viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img"
      aria-label="Bound and norm of ${layers.length} layers; the table has the numbers">
      ${ticks.map(
        (value) => html`
        <line class="grid" x1=${LEFT} x2=${WIDTH} y1=${y(value)} y2=${y(value)} />
        <text x=${LEFT - 6} y=${y(value) + 4} text-anchor="end">${fixed(value, digits)}</text>
      `,
      )}
      ${layers.map((layer, index) => {
        const x = LEFT + index * step;
        return html`
          <g>
            <title>Layer ${index}: bound ${fixed(layer.bound, 4)}, norm ${fixed(layer.norm, 4)}</title>
            <rect class="norm" x=${x + step * 0.2} y=${y(layer.norm)} width=${step * 0.6}
              height=${y(0) - y(layer.norm)} />
            <line class="bound" x1=${x + step * 0.08} x2=${x + step * 0.92}
              y1=${y(layer.bound)} y2=${y(layer.bound)} />
            ${index % 5 === 0 &&
            html`<text x=${x + step / 2} y=${HEIGHT - 7} text-anchor="middle">${index}</text>`}
          </g>
        `;
      })}
    </svg><//>
    <p class="hint"><span class="key-norm" aria-hidden="true"></span> norm, measured
      ${" "}<span class="key-bound" aria-hidden="true"></span> bound, proved · layers from 0</p>
    <details>
      <summary>Numbers by layer</summary>
      <${Scroll} label="Numbers by layer"><table>
        <thead><tr><th scope="col">Layer</th><th scope="col" class="number">Norm</th>
          <th scope="col" class="number">Bound</th><th scope="col" class="number">Gate</th></tr></thead>
        <tbody>${layers.map(
          (layer, index) => html`
          <tr><th scope="row">${index}</th><td class="number">${fixed(layer.norm, 4)}</td>
            <td class="number">${fixed(layer.bound, 4)}</td><td class="number">${fixed(layer.gate, 4)}</td></tr>
        `,
        )}</tbody>
      </table><//>
    </details>
  `;
}

/** A round distance, of which there are at most five from 0 to `top`. */
function tickOf(top) {
  const power = 10 ** Math.floor(Math.log10(top));
  if (top <= 2 * power) return power / 2;
  return top <= 5 * power ? power : 2 * power;
}
