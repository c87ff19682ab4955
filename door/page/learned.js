// What was learned, from where, and the ways back: samples, generations, jobs.

import { ask } from "./api.js";
import { busy, button, find, loss, make, many, percent, show, size, when } from "./dom.js";
import { noteJob, tell, watch } from "./live.js";
import { taught } from "./teach.js";
import { known, redraw } from "./timeline.js";
import { act, forget, rollBack, whenChanged } from "./undo.js";

const MAX_JOBS = 8;
const MAX_DETAILS = 24; // Generations whose contents are read for the timeline.
const LIVE = ["queued", "training"];

let generations = [];
let details = new Map(); // generation -> what was learned in it
let recent = null; // What no generation holds yet.
let jobs = [];

export function startLearned() {
  const load = watch(
    ({ checkpoint, trainer }) => [
      checkpoint?.generation,
      checkpoint?.public_generation,
      trainer?.job_id,
      trainer?.steps,
      trainer?.queued_samples,
      trainer?.weights_version,
    ],
    read,
  );
  whenChanged(() => {
    details = new Map(); // What is forgotten now is said so.
    load();
  });
}

async function read() {
  const found = await Promise.all([
    ask("GET", "/checkpoints"),
    ask("GET", "/learned"),
    ask("GET", "/train/jobs"),
  ]);
  [generations, recent, jobs] = [found[0].data, found[1], found[2].data];
  jobs.toReversed().forEach(noteJob);
  known.generations = generations;
  render();
  tell();
  for (const each of generations.slice(0, MAX_DETAILS)) {
    if (details.has(each.generation)) continue;
    details.set(each.generation, await ask("GET", `/checkpoints/${each.generation}`));
    known.drifts.set(each.generation, details.get(each.generation).drift.share_changed);
    render();
  }
  redraw();
}

function render() {
  const [newest] = generations;
  show(
    find("learned"),
    jobs.some((job) => LIVE.includes(job.status)) ? jobList("Now", true) : null,
    recent.num_items ? notKept(newest) : null,
    make("h3", {}, "Generations"),
    make("p", { class: "hint" }, "States of the weights that are on disk, the newest first."),
    make("ul", { class: "list" }, ...generations.map(generationOf)),
    jobList("Jobs", false),
  );
}

function notKept(newest) {
  return make(
    "div",
    {},
    make(
      "div",
      { class: "head" },
      make("h3", {}, "Not kept yet"),
      button("Keep now", (event) => keep(event.target), { "data-mark": "keep" }),
    ),
    make(
      "p",
      { class: "hint" },
      `Learned since generation ${newest.generation}; after a crash it would be learned again.`,
    ),
    items(recent, newest),
  );
}

function keep(element) {
  return busy(element, () =>
    act("Keeping", () => ask("POST", "/checkpoint", {}), (made) =>
      `Generation ${made.generation} is kept and public, at version ${made.weights_version}.`,
    ),
  );
}

function generationOf(each) {
  const id = each.generation;
  const detail = details.get(id);
  const kind = each.returns_to === null ? each.kind : `return to ${each.returns_to}`;
  const isLive = id === generations[0].generation && !recent.num_steps;
  const learned = detail?.learned;
  return make(
    "li",
    {},
    make(
      "details",
      { "data-id": `generation-${id}` },
      make(
        "summary",
        { "data-mark": `generation-${id}` },
        make("b", {}, `Generation ${id}`),
        make("span", { class: "chip" }, `v${each.weights_version}`),
        make("span", { class: "caption" }, `${kind}, ${when(each.created)}`),
        isLive ? make("span", { class: "tag good" }, "live") : null,
        each.is_public ? make("span", { class: "tag" }, "public") : null,
        learned?.num_items
          ? make("span", { class: "caption" }, many(learned.num_items, "item"))
          : null,
      ),
      detail ? inside(each, detail) : make("p", { class: "hint" }, "Reading\u2026"),
    ),
    isLive
      ? null
      : button("Roll back", () => rollBack(each, namesAfter(each)), {
          class: "quiet",
          "aria-label": `Roll back to generation ${id}`,
          "data-mark": `back-${id}`,
        }),
  );
}

function inside(each, { learned, drift, forgotten }) {
  const facts = [`${percent(drift.share_changed)} of the weights changed`];
  if (each.size_bytes) facts.push(size(each.size_bytes));
  if (learned.num_steps) {
    facts.push(
      `${many(learned.num_steps, "step")}, loss ${loss(learned.first_loss)} to ` +
        loss(learned.last_loss),
    );
  }
  if (forgotten.length) facts.push(`forgot ${forgotten.join(", ")}`);
  const parent = generations.find((other) => other.generation === each.parent);
  return make(
    "div",
    {},
    make("p", { class: "hint" }, facts.join(" \u00b7 ")),
    learned.num_items ? items(learned, parent) : null,
  );
}

// Ids of what was learned after a generation, the newest first, as far as it is known.
function namesAfter(goal) {
  const after = generations.filter((each) => each.generation > goal.generation);
  const lists = [recent, ...after.map((each) => details.get(each.generation)?.learned)];
  return [...new Set(lists.flatMap((each) => each?.items ?? []).map((item) => item.id))];
}

function items(learned, parent) {
  const rows = learned.items.map((item) =>
    make(
      "li",
      { class: "item" },
      make(
        "div",
        { class: "what" },
        taught.has(item.id)
          ? make("span", { title: item.id }, taught.get(item.id))
          : make("span", { class: "code" }, item.id),
        make(
          "span",
          { class: "caption" },
          [item.source ?? "no source", many(item.num_steps, "step"),
            `loss ${loss(item.first_loss)} to ${loss(item.last_loss)}`].join(" \u00b7 "),
        ),
      ),
      item.is_forgotten
        ? make("span", { class: "tag" }, "forgotten")
        : button("Forget", () => forget(item, parent), {
            class: "quiet",
            "aria-label": `Forget ${item.id}`,
            "data-mark": `forget-${item.id}`,
          }),
    ),
  );
  const more = learned.num_items - learned.items.length;
  if (more > 0) rows.push(make("li", { class: "hint" }, `and ${more} more`));
  return make("ul", { class: "items" }, ...rows);
}

function jobList(title, isLive) {
  const some = jobs.filter((job) => LIVE.includes(job.status) === isLive).slice(0, MAX_JOBS);
  if (!some.length) return null;
  return make("div", {}, make("h3", {}, title), make("ul", { class: "items" }, ...some.map(jobOf)));
}

function jobOf(job) {
  const words = [
    many(job.training_samples, "sample"),
    `${job.steps} of ${many(job.total_steps, "step")}`,
    job.steps ? `loss ${loss(job.loss_history[0])} to ${loss(job.loss_history.at(-1))}` : null,
    when(job.created),
  ].filter(Boolean);
  const state = { failed: "tag bad", done: "tag good" }[job.status] ?? "tag";
  return make(
    "li",
    { class: "item" },
    make(
      "div",
      { class: "what" },
      make("span", { class: "code" }, job.job_id),
      make("span", { class: "caption" }, words.join(" \u00b7 ")),
      job.error ? make("span", { class: "fault" }, job.error) : null,
      LIVE.includes(job.status)
        ? make("progress", {
            max: job.total_steps,
            value: job.steps,
            "aria-label": `Steps of ${job.job_id}`,
          })
        : null,
    ),
    make("span", { class: state }, job.status),
    LIVE.includes(job.status)
      ? button("Cancel", (event) => cancel(job, event.target), {
          class: "quiet",
          "aria-label": `Cancel ${job.job_id}`,
        })
      : null,
  );
}

function cancel(job, element) {
  return busy(element, () =>
    act("Cancelling", () => ask("DELETE", `/train/jobs/${job.job_id}`), (now) =>
      now.status === "training"
        ? `${job.job_id} ends after the step in progress.`
        : `${job.job_id} is ${now.status}.`,
    ),
  );
}

