// Behaviours, and the rounds in which they are dreamt of; each round has its report.

import { address, ask, key, open } from "./api.js";
import { busy, button, find, make, many, notice, percent, show, when } from "./dom.js";
import { live, watch } from "./live.js";
import { known, redraw } from "./timeline.js";
import { act, whenChanged } from "./undo.js";

const MAX_ROUNDS = 20;
const REPORT_LIFE_MS = 60000;

let behaviours = [];
let rounds = [];

export function startDreams() {
  const load = watch(
    ({ dream }) => [dream?.state, dream?.round_id, dream?.stage, dream?.done, dream?.asked,
      dream?.paused],
    read,
  );
  whenChanged(load);
}

async function read() {
  const found = await Promise.all([ask("GET", "/behaviours"), ask("GET", "/dream/rounds")]);
  [behaviours, rounds] = found.map((each) => each.data);
  known.rounds = rounds.flatMap(measured);
  redraw();
  const dream = live.status.dream;
  show(
    find("dreams"),
    now(dream),
    make("h3", {}, "Behaviours"),
    behaviours.length
      ? make("ul", { class: "items" }, ...behaviours.map(behaviourOf))
      : make("p", { class: "hint" }, "None. Add one with ",
          make("code", {}, "reverie behaviours --add one-short-sentence"), " or PUT /behaviours."),
    make("h3", {}, "Rounds"),
    rounds.length
      ? make("ul", { class: "items" }, ...rounds.slice(0, MAX_ROUNDS).map(roundOf))
      : make("p", { class: "hint" }, "None yet."),
  );
}

// What the gate saw of a round, at the version nearest to it.
function measured(round) {
  const kl = round.attempts.at(-1)?.measured?.kl;
  const version = known.generations
    .filter((each) => each.created <= (round.ended ?? Infinity) + 60)
    .sort((a, b) => a.created - b.created)
    .at(-1)?.weights_version;
  return kl === undefined || version === undefined ? [] : [{ id: round.id, kl, version }];
}

function now(dream) {
  const isBusy = dream.state !== "idle" || dream.asked > 0;
  const stage = dream.stage ? `${dream.stage} ${dream.done} of ${dream.total}` : "";
  const words = [
    dream.round_id ?? (isBusy ? "about to begin" : "Not dreaming"),
    dream.behaviour,
    stage,
    dream.state === "waiting" ? "waits while somebody is answered" : null,
    dream.asked ? `${many(dream.asked, "round")} asked for` : null,
    dream.paused,
  ].filter(Boolean);
  return make(
    "div",
    { class: "head now" },
    make(
      "div",
      { class: "what" },
      make("p", {}, words.join(" \u00b7 ")),
      dream.total
        ? make("progress", { max: dream.total, value: dream.done, "aria-label": dream.stage })
        : null,
    ),
    isBusy
      ? button("Stop dreaming", (event) => stop(event.target), { "data-mark": "stop-dream" })
      : null,
  );
}

function behaviourOf(each) {
  const progress = each.progress;
  const shown = 1 - progress.failure_rate;
  return make(
    "li",
    { class: "item" },
    make(
      "div",
      { class: "what" },
      make("b", {}, each.name),
      make("span", {}, each.instruction),
      make("meter", {
        min: 0,
        max: 1,
        value: shown,
        "aria-label": `Shown by ${percent(shown)} of the answers`,
      }),
      make(
        "span",
        { class: "caption" },
        progress.tested_round
          ? `shown in ${percent(shown)} of unseen situations, aim ${percent(progress.target)}`
          : `not tested yet, aim ${percent(progress.target)}`,
      ),
    ),
    make("span", { class: progress.standing === "stopped" ? "tag bad" : "tag" }, progress.standing),
    button("Dream of it", (event) => dreamOf(each, event.target), {
      class: "quiet",
      "aria-label": `Dream of ${each.name}`,
      "data-mark": `dream-${each.name}`,
    }),
  );
}

function roundOf(each) {
  const attempt = each.attempts.at(-1);
  const before = each.success_before[each.behaviour];
  const after = attempt?.success?.[each.behaviour];
  const words = [
    when(each.created),
    each.counts.kept === undefined ? null : many(each.counts.kept, "answer"),
    before === undefined || after === undefined ? null
      : `shown ${percent(before)} \u2192 ${percent(after)}`,
    attempt?.measured ? `KL ${attempt.measured.kl.toFixed(3)}` : null,
    each.reason,
    ...(attempt?.faults ?? []),
  ].filter(Boolean);
  const state = { passed: "tag good", "taken back": "tag bad", failed: "tag bad" }[each.state];
  return make(
    "li",
    { class: "item" },
    make(
      "div",
      { class: "what" },
      make("span", {}, make("b", {}, each.id), ` ${each.behaviour}`),
      make("span", { class: "caption" }, words.join(" \u00b7 ")),
    ),
    make("span", { class: state ?? "tag" }, each.state),
    make(
      "a",
      {
        href: address(`/dream/rounds/${each.id}/report`),
        target: "_blank",
        rel: "noopener",
        "aria-label": `Report of ${each.id}`,
        onclick: report,
      },
      "Report",
    ),
  );
}

// A link cannot carry the key, so with one the report is fetched and opened from memory.
async function report(event) {
  if (!key()) return;
  event.preventDefault();
  const path = new URL(event.currentTarget.href).pathname;
  try {
    const response = await open("GET", path.slice(address("/").pathname.length));
    const url = URL.createObjectURL(await response.blob());
    setTimeout(() => URL.revokeObjectURL(url), REPORT_LIFE_MS);
    window.open(url, "_blank");
  } catch (error) {
    notice(error.message, true);
  }
}

function dreamOf(each, element) {
  const body = { rounds: 1, behaviour: each.name };
  return busy(element, () =>
    act("Asking for a dream", () => ask("POST", "/dream", body), () =>
      `A round of ${each.name} begins as soon as nobody needs the machine.`,
    ),
  );
}

function stop(element) {
  return busy(element, () =>
    act("Stopping", () => ask("DELETE", "/dream"), () => "No more rounds; what ran is taken back."),
  );
}
