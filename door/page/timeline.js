// Loss, drift and generations over the versions of the weights, with marks where answers came from.
//
//   loss    ~~~\__        one point per step
//   drift   |  |__|       how much of the weights each generation changed; KL of dream rounds
//   marks   g0 g1 g2      generations; triangles are answers
//
// Versions are put side by side in their order: what a crash skipped takes no room.

import { answered } from "./chat.js";
import { draw, find, loss, percent, when } from "./dom.js";
import { listen, live } from "./live.js";
import { path, scale, ticks } from "./plot.js";

const LEFT = 38;
const RIGHT = 14;
const TOP = 20;
const LOSS_HEIGHT = 132;
const GAP = 22;
const DRIFT_HEIGHT = 40;
const FOOT = 34;
const HEIGHT = TOP + LOSS_HEIGHT + GAP + DRIFT_HEIGHT + FOOT;

// Filled by whoever reads them: generations with `share_changed`, rounds with `kl`, by version.
export const known = { generations: [], drifts: new Map(), rounds: [] };

let cursor = null; // Index of the version that is pointed at.
let columns = [];

export function startTimeline() {
  const plot = find("plot");
  find("span").onchange = redraw;
  new ResizeObserver(redraw).observe(plot);
  listen(redraw);
  plot.addEventListener("pointermove", (event) => point(plot, event));
  plot.addEventListener("pointerleave", () => move(null));
}

let isDue = false;
export function redraw() {
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    render(find("plot"));
  });
}

function render(plot) {
  const width = Math.max(240, plot.clientWidth);
  columns = versions();
  const current = live.status?.weights_version ?? null;
  const hadFocus = plot.contains(document.activeElement);
  if (cursor !== null && cursor >= columns.length) cursor = null;
  const x = scale(0, Math.max(1, columns.length - 1), LEFT + 6, width - RIGHT - 6);
  const steps = columns
    .map((version, at) => ({ at, ...live.steps.get(version) }))
    .filter((each) => each.loss !== undefined);
  const svg = draw("svg", {
    width,
    height: HEIGHT,
    viewBox: `0 0 ${width} ${HEIGHT}`,
    role: "img",
    tabindex: "0",
    "aria-label": summary(steps, current),
    onkeydown: keys,
  });
  svg.append(
    ...generations(x),
    ...lossLane(steps, x, width),
    ...driftLane(x, width),
    ...foot(x, width, current),
    ...pointer(x),
  );
  plot.replaceChildren(svg);
  if (hadFocus) svg.focus({ preventScroll: true });
  const readout = find("readout");
  readout.setAttribute("aria-live", cursor === null ? "off" : "polite"); // Not at every step.
  readout.textContent = cursor === null ? summary(steps, current) : told(cursor);
}

// All versions that there is something to show of, in order; the newest of them, if so chosen.
function versions() {
  const all = new Set([...live.steps.keys(), ...known.generations.map((g) => g.weights_version)]);
  const current = live.status?.weights_version;
  if (current !== null && current !== undefined) all.add(current);
  const ordered = [...all].sort((a, b) => a - b);
  const most = Number(find("span").value);
  return most ? ordered.slice(-most) : ordered;
}

function lossLane(steps, x, width) {
  const floor = TOP + LOSS_HEIGHT;
  const highest = Math.max(...steps.map((each) => each.loss), 0.1);
  const y = scale(0, highest * 1.04, floor, TOP);
  const parts = ticks(highest, 3).flatMap((value) => [
    draw("line", { x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value), class: "grid" }),
    draw("text", { x: LEFT - 6, y: y(value) + 4, class: "tick end" }, String(+value.toFixed(3))),
  ]);
  parts.push(draw("text", { x: LEFT - 32, y: 12, class: "lane" }, "loss"));
  if (!steps.length) {
    const at = { x: (LEFT + width - RIGHT) / 2, y: floor - LOSS_HEIGHT / 2, class: "none" };
    return [...parts, draw("text", at, "nothing was learned yet")];
  }
  const points = steps.map((each) => [x(each.at), y(each.loss)]);
  const area = `${path(points)}L${points.at(-1)[0]} ${floor}L${points[0][0]} ${floor}Z`;
  const [cx, cy] = points.at(-1);
  return [
    ...parts,
    draw("path", { d: area, class: "area" }),
    draw("path", { d: path(points), class: "loss" }),
    draw("circle", { cx, cy, r: 3.5, class: live.status?.trainer?.job_id ? "now live" : "now" }),
  ];
}

// Bars from a generation's parent to itself; dots where a dream round was measured.
function driftLane(x, width) {
  const roof = TOP + LOSS_HEIGHT + GAP;
  const floor = roof + DRIFT_HEIGHT;
  const parts = [
    draw("line", { x1: LEFT, x2: width - RIGHT, y1: floor, y2: floor, class: "grid" }),
    draw("text", { x: LEFT + 12, y: roof - 6, class: "lane" }, "weights changed"),
  ];
  const parents = new Map(known.generations.map((g) => [g.generation, g.weights_version]));
  for (const each of known.generations) {
    const share = known.drifts.get(each.generation);
    const end = columns.indexOf(each.weights_version);
    if (share === undefined || end < 0 || each.parent === null) continue;
    const begin = Math.max(0, columns.indexOf(parents.get(each.parent)));
    const height = Math.max(1, share * DRIFT_HEIGHT);
    const at = { x: x(begin) + 1, width: Math.max(2, x(end) - x(begin) - 2) };
    parts.push(draw("rect", { ...at, y: floor - height, height, class: "drift" }));
  }
  const rounds = known.rounds.filter((each) => columns.includes(each.version));
  const highest = Math.max(...rounds.map((each) => each.kl), 0.1);
  for (const each of rounds) {
    const cy = scale(0, highest, floor, roof)(each.kl);
    parts.push(draw("circle", { cx: x(columns.indexOf(each.version)), cy, r: 3, class: "kl" }));
  }
  if (rounds.length) {
    const at = { x: width - RIGHT, y: roof - 6, class: "lane end" };
    const lane = width < 420 ? "KL" : "KL of dreams";
    const scaleWords = ` ${lane}, to ${highest.toFixed(2)} nats`;
    parts.push(draw("text", at, draw("tspan", { class: "kl" }, "\u25cf"), scaleWords));
  }
  return parts;
}

// The newest has its name first; older ones only where there is room beside it.
function generations(x) {
  const bottom = HEIGHT - FOOT;
  let free = Infinity;
  return known.generations
    .filter((each) => columns.includes(each.weights_version))
    .sort((a, b) => b.weights_version - a.weights_version)
    .flatMap((each) => {
      const at = x(columns.indexOf(each.weights_version));
      const isReturn = each.returns_to !== null;
      const words = `g${each.generation}${isReturn ? `\u21a9${each.returns_to}` : ""}`;
      const isRoom = at < free;
      if (isRoom) free = at - 8 - 6.5 * words.length;
      const kind = isReturn ? "generation return" : "generation";
      return [
        draw("line", { x1: at, x2: at, y1: TOP, y2: bottom, class: kind }),
        isRoom ? draw("text", { x: at, y: TOP - 6, class: `${kind} middle` }, words) : "",
      ];
    });
}

function foot(x, width, current) {
  const line = HEIGHT - FOOT + 23;
  const parts = [];
  const first = columns[0];
  const last = columns.at(-1);
  if (columns.length > 1) {
    parts.push(draw("text", { x: LEFT, y: line, class: "tick" }, `v${first}`));
  }
  if (columns.length) {
    const at = { x: width - RIGHT, y: line, class: "tick end strong" };
    parts.push(draw("text", at, `v${current ?? last}`));
  }
  for (const version of new Set(answered)) {
    const at = columns.indexOf(version);
    if (at < 0) continue;
    const px = x(at);
    const base = HEIGHT - FOOT + 2;
    const shape = `M${px} ${base}l4 7h-8Z`;
    parts.push(draw("path", { d: shape, class: "answer" }));
  }
  return parts;
}

function pointer(x) {
  if (cursor === null) return [];
  const at = x(cursor);
  return [draw("line", { x1: at, x2: at, y1: TOP, y2: HEIGHT - FOOT, class: "cursor" })];
}

function point(plot, event) {
  if (!columns.length) return;
  const box = plot.getBoundingClientRect();
  const share = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
  move(Math.round(Math.min(1, Math.max(0, share)) * (columns.length - 1)));
}

function move(to) {
  if (to === cursor) return;
  cursor = to;
  redraw();
}

function keys(event) {
  const last = columns.length - 1;
  const at = cursor ?? last;
  const goal = {
    ArrowLeft: Math.max(0, at - 1),
    ArrowRight: Math.min(last, at + 1),
    Home: 0,
    End: last,
    Escape: null,
  }[event.key];
  if (goal === undefined || last < 0) return;
  event.preventDefault();
  move(goal);
}

function summary(steps, current) {
  const trainer = live.status?.trainer;
  const version = current === null ? "No weights yet" : `Version ${current}`;
  if (!steps.length) return `${version}; no step to show`;
  const work = trainer?.job_id ? `, learning ${trainer.job_id}` : "";
  const seconds = trainer?.job_id ? trainer.last_step_s : null;
  const pace = seconds ? `, ${seconds.toFixed(1)} s a step` : "";
  return `${version}, loss ${loss(steps.at(-1).loss)}${work}${pace}`;
}

// One version in words: what a mouse points at, or the arrow keys.
function told(at) {
  const version = columns[at];
  const parts = [`Version ${version}`];
  const step = live.steps.get(version);
  if (step) parts.push(`loss ${loss(step.loss)}`);
  for (const each of known.generations.filter((g) => g.weights_version === version)) {
    const share = known.drifts.get(each.generation);
    const drift = share === undefined ? "" : `, ${percent(share)} of the weights changed`;
    const back = each.returns_to === null ? "" : `, a return to ${each.returns_to}`;
    parts.push(`generation ${each.generation} (${when(each.created)}${back}${drift})`);
  }
  const round = known.rounds.find((each) => each.version === version);
  if (round) parts.push(`${round.id}: KL ${round.kl.toFixed(3)}`);
  if (answered.includes(version)) parts.push("answered from here");
  return parts.join(" \u00b7 ");
}
