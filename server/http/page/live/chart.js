// A chart of values over time, with its last values in words.

import { useEffect, useLayoutEffect, useRef } from "preact/hooks";
import uPlot from "uplot";

import { html } from "../html.js";

const HEIGHT = 150;
const LEAST_SPAN_S = 60; // one reading alone has no span
const DARK = matchMedia("(prefers-color-scheme: dark)");

/**
 * `series` are {name, label, colour, isSparse}: `name` is the field of a point, `colour` a custom
 * property, and sparse is one that often has no value: its points are drawn, not only its line.
 * `show` writes a value. The scale ends at `max`, or follows the values from `least` on.
 */
export function Chart({ title, points, series, show, least, max }) {
  const place = useRef(null);
  const plot = useRef(null);
  useLayoutEffect(() => { // ends before its place is gone; an effect ends later
    const draw = () => {
      plot.current?.destroy();
      plot.current = new uPlot(
        options(place.current, series, show, least, max),
        data(points, series),
        place.current,
      );
    };
    draw();
    const resized = new ResizeObserver(() => {
      plot.current.setSize({ width: place.current.clientWidth, height: HEIGHT });
    });
    resized.observe(place.current);
    DARK.addEventListener("change", draw);
    return () => {
      resized.disconnect();
      DARK.removeEventListener("change", draw);
      plot.current.destroy();
    };
  }, []);
  useEffect(() => plot.current.setData(data(points, series)), [points]);
  const last = (name) => points.findLast((point) => point[name] != null)?.[name];
  return html`
    <figure class="card chart">
      <figcaption>
        <h3>${title}</h3>
        ${series.map(
          ({ name, label, colour }) => html`
          <span class="value">
            <span class="swatch" style=${{ background: `var(${colour})` }} aria-hidden="true"></span>
            ${label}${" "}
            <strong data-series=${name}>${shown(last(name), show)}</strong>
          </span>
        `,
        )}
      </figcaption>
      <div ref=${place} class="plot" aria-hidden="true"></div>
    </figure>
  `;
}

function shown(value, show) {
  return value === undefined ? "–" : show(value);
}

function data(points, series) {
  return [
    points.map((point) => point.time),
    ...series.map(({ name }) => points.map((point) => point[name])),
  ];
}

/** From the first time to the last; uPlot would make a day of one time alone. */
function spanOf(times) {
  const last = times.at(-1) ?? LEAST_SPAN_S;
  return [Math.min(times[0] ?? 0, last - LEAST_SPAN_S), last];
}

function clock(time) {
  return new Date(time * 1000).toLocaleTimeString("en-GB");
}

function options(place, series, show, least, max) {
  const colour = (name) => getComputedStyle(place).getPropertyValue(name).trim();
  const axis = {
    stroke: colour("--soft"),
    grid: { stroke: colour("--line"), width: 1 },
    ticks: { show: false },
  };
  return {
    width: place.clientWidth,
    height: HEIGHT,
    legend: { show: false },
    cursor: { show: false },
    scales: {
      x: { range: (plot) => spanOf(plot.data[0]) },
      y: { range: (_, low, high) => [0, max ?? Math.max(high * 1.1, least)] },
    },
    axes: [
      { ...axis, size: 28, space: 90, values: (_, times) => times.map(clock) },
      { ...axis, size: 58, values: (_, values) => values.map(show) },
    ],
    series: [
      {},
      ...series.map(({ colour: name, label, isSparse }) => ({
        label,
        stroke: colour(name),
        width: 1.5,
        spanGaps: true,
        points: { show: Boolean(isSparse), size: 5 },
      })),
    ],
  };
}
