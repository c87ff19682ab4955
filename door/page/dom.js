// Making elements, and saying numbers and times; all text goes in as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";

export const find = (id) => document.getElementById(id);

// An element with properties, `on...` listeners and attributes, and children that are not null.
export function make(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

export function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export function button(words, act, properties = {}) {
  return make("button", { type: "button", onclick: act, ...properties }, words);
}

// Runs `work` with the button off, so that nothing is asked twice.
export async function busy(element, work) {
  element.disabled = true;
  try {
    return await work();
  } finally {
    element.disabled = false;
  }
}

// Replaces children only where something changed: focus and open details stay where they were.
export function show(element, ...children) {
  const old = element.querySelectorAll("details[data-id][open]");
  const open = new Set(Array.from(old, (each) => each.dataset.id));
  const focused = element.contains(document.activeElement) ? document.activeElement : null;
  const mark = focused?.dataset.mark;
  element.replaceChildren(...children.flat().filter((child) => child !== null));
  for (const each of element.querySelectorAll("details[data-id]")) {
    if (open.has(each.dataset.id)) each.open = true;
  }
  if (mark) element.querySelector(`[data-mark="${CSS.escape(mark)}"]`)?.focus();
}

export const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

export function loss(value) {
  if (value === null || value === undefined) return "\u2013";
  return value >= 0.01 || value === 0 ? value.toFixed(2) : value.toExponential(1);
}

export function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (bytes >= 1024 && at < units.length - 1) {
    bytes /= 1024;
    at += 1;
  }
  return `${bytes < 10 && at ? bytes.toFixed(1) : Math.round(bytes)} ${units[at]}`;
}

export function when(seconds) {
  const then = new Date(1000 * seconds);
  const time = then.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  if (then.toDateString() === new Date().toDateString()) return time;
  return `${then.toLocaleDateString([], { day: "numeric", month: "short" })} ${time}`;
}

export function clip(text, length = 80) {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length <= length ? line : `${line.slice(0, length - 1)}\u2026`;
}

export const many = (count, one, more = `${one}s`) => `${count} ${count === 1 ? one : more}`;

// Says what came of something, to eyes and to screen readers.
let fading = null;
export function notice(words, isError = false) {
  const place = find("notice");
  clearTimeout(fading);
  place.setAttribute("role", isError ? "alert" : "status");
  place.classList.toggle("error", isError);
  place.replaceChildren(
    make("span", {}, words),
    button("Dismiss", () => place.replaceChildren(), { class: "quiet" }),
  );
  if (!isError) fading = setTimeout(() => place.replaceChildren(), 12000);
}
