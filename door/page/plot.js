// Small drawings: lines and scales in SVG, with attributes only, as the page's policy asks for.

import { draw } from "./dom.js";

// Maps [low, high] onto [from, to].
export function scale(low, high, from, to) {
  const span = high - low || 1;
  return (value) => from + ((value - low) / span) * (to - from);
}

// Round values that divide [0, high], about `count` of them.
export function ticks(high, count) {
  if (!(high > 0)) return [0];
  const rough = high / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  return Array.from({ length: Math.floor(high / step + 1e-9) + 1 }, (_, at) => at * step);
}

export const path = (points) =>
  points.map(([x, y], at) => `${at ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

// The losses of one job as a line that grows to the width of all its steps.
export function curve(losses, total) {
  const width = 240;
  const height = 36;
  const x = scale(0, Math.max(1, total - 1), 2, width - 4);
  const y = scale(0, Math.max(...losses, 1e-9), height - 3, 4);
  const points = losses.map((value, at) => [x(at), y(value)]);
  return draw(
    "svg",
    {
      viewBox: `0 0 ${width} ${height}`,
      class: "curve",
      "aria-hidden": "true",
      preserveAspectRatio: "none",
    },
    draw("line", { x1: 0, x2: width, y1: height - 2, y2: height - 2, class: "axis" }),
    points.length ? draw("path", { d: path(points), class: "loss" }) : null,
  );
}
