// The state of the cell: above everything while it is not well, and as a panel with its memory.

import { find, make, many, show, size } from "./dom.js";
import { listen } from "./live.js";

const ROLES = ["engine", "trainer", "checkpoint", "dream", "ingress", "cell"];

export function startState() {
  listen(({ status }) => {
    header(status);
    banner(status);
    if (status.stages) panel(status);
  });
}

function words(status) {
  if (status.state !== "ready") return status.state;
  if (paused(status).length) return "paused";
  if (status.trainer?.job_id) return "learning";
  if (status.dream?.state === "dreaming") return "dreaming";
  return "ready";
}

function header(status) {
  find("health").dataset.state = words(status);
  find("health-words").textContent = words(status);
  find("model").textContent = status.model ?? "";
  find("version").textContent = status.weights_version ?? "\u2013";
  document.title = status.weights_version ? `Reverie v${status.weights_version}` : "Reverie";
}

function paused(status) {
  return [
    ["training", status.trainer?.paused],
    ["keeping", status.checkpoint?.paused],
  ].filter(([, why]) => why);
}

function banner(status) {
  const lines = paused(status).map(([what, why]) => make("p", {}, `${what} is paused: ${why}`));
  if (status.state !== "ready") {
    const why = status.reason ? `: ${status.reason}` : "";
    lines.unshift(make("p", {}, make("b", {}, `The cell is ${status.state}`), why));
    if (status.stages?.length) lines.push(stages(status));
  }
  const place = find("banner");
  const text = lines.map((line) => line.textContent).join("\n");
  if (place.dataset.text !== text) {
    place.dataset.text = text; // Said once, not at every snapshot.
    place.replaceChildren(...lines);
  }
  place.hidden = !lines.length;
}

function stages(status) {
  return make(
    "ol",
    { class: "stages" },
    ...status.stages.map((stage) =>
      make("li", { "data-done": stage.is_done },
        stage.is_done ? `${stage.name} ${stage.seconds.toFixed(1)} s` : `${stage.name}\u2026`),
    ),
  );
}

function panel(status) {
  const { trainer, checkpoint, dream, ingress } = status;
  show(
    find("cell"),
    make("h3", {}, "Memory"),
    ...memory(status),
    make("h3", {}, "Numbers"),
    facts([
      ["version of the weights", status.weights_version],
      ["epoch of cached prefixes", status.epoch],
      ["newest generation", checkpoint?.generation],
      ["public generation", checkpoint?.public_generation],
      ["samples that wait", trainer?.queued_samples],
      ["newest step", trainer?.last_step_s ? `${trainer.last_step_s.toFixed(2)} s` : null],
      ["on trial", trainer?.on_trial],
      ["exchanges to score / to decide", dream ? `${dream.unscored} / ${dream.proposed}` : null],
      ["requests inside", ingress?.ongoing_requests],
      ["restarts", status.restarts],
    ]),
    make("h3", {}, "Processes"),
    facts(ROLES.filter((role) => status[role]?.pid).map((role) => [role, pids(status[role])])),
    make("h3", {}, "Boot"),
    stages(status),
  );
}

const pids = (report) => [report.pid, ...(report.child_pids ?? [])].join(", ");

function facts(rows) {
  const known = rows.filter(([, value]) => value !== null && value !== undefined);
  return make(
    "dl",
    { class: "facts" },
    ...known.map(([name, value]) =>
      make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))),
  );
}

// The one copy of the weights, which several map, and what each role has for itself.
function memory(status) {
  const trainer = status.trainer;
  const parts = Object.entries(status.memory ?? {})
    .map(([role, of]) => [`${role}, its own`, of.private_bytes]);
  const shown = [["weights, one copy", trainer?.weights_bytes], ...parts]
    .filter(([, bytes]) => bytes > 0);
  if (!shown.length) return [make("p", { class: "hint" }, "Not known yet.")];
  const most = Math.max(...shown.map(([, bytes]) => bytes));
  const within = [
    trainer?.num_tensors ? many(trainer.num_tensors, "tensor") : null,
    trainer?.state_bytes ? `${size(trainer.state_bytes)} of the trainer's: optimizer state` : null,
    trainer?.last_step_bytes ? `the newest step took ${size(trainer.last_step_bytes)} more` : null,
  ].filter(Boolean);
  return [
    make(
      "dl",
      { class: "bars" },
      ...shown.map(([name, bytes]) =>
        make(
          "div",
          {},
          make("dt", {}, name),
          make("dd", {},
            make("meter", { min: 0, max: most, value: bytes, "aria-hidden": "true" }),
            make("span", {}, size(bytes))),
        ),
      ),
    ),
    make("p", { class: "hint" }, within.join(" \u00b7 ")),
  ];
}
