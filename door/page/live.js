// What the cell says of itself, as it changes: one stream of events for the whole page.

import { Refused, events, open } from "./api.js";

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 10000;

export const live = {
  status: null,
  steps: new Map(), // version -> {version, loss, changed}
  mayTeach: false,
  hasKeys: false,
};

const listeners = [];

// `hear(live)` is called after every change.
export function listen(hear) {
  listeners.push(hear);
  if (live.status) hear(live);
}

export function tell() {
  for (const hear of listeners) hear(live);
}

// Loads again whenever what `keyOf(status)` names is other than it was: never twice at once, and
// not more often than every `pauseMs`. Returns a function that loads now.
export function watch(keyOf, load, pauseMs = 1500) {
  let seen = null;
  let isLoading = false;
  let isDue = false;

  async function run() {
    if (isLoading) {
      isDue = true;
      return;
    }
    isLoading = true;
    isDue = false;
    try {
      await load();
    } catch (error) {
      console.info(error.message); // The next change tries again.
    }
    await new Promise((go) => setTimeout(go, pauseMs));
    isLoading = false;
    if (isDue) run();
  }

  listen(({ status, mayTeach }) => {
    const now = JSON.stringify([status.boot, mayTeach, keyOf(status)]);
    if (now === seen || status.state !== "ready") return;
    seen = now;
    if (mayTeach) run();
  });
  return run;
}

export function noteStep(step) {
  if (step.version === null || step.version === undefined || step.loss === null) return;
  live.steps.set(step.version, { ...live.steps.get(step.version), ...step });
}

// Losses of a job as steps; they carry no versions of their own, but follow each other.
export function noteJob(job) {
  const losses = job.loss_history;
  if (job.weights_version_before === null || !losses.length) return;
  const first = job.weights_version_before + job.steps - losses.length + 1;
  losses.forEach((loss, at) => noteStep({ version: first + at, loss }));
}

// Stays connected while the page is seen: a browser has six connections to a server, of all its
// tabs together. `refused(error)` resolves when it is worth another try with another key.
export async function follow(refused) {
  let pause = FIRST_PAUSE_MS;
  while (true) {
    await seen();
    const leaving = new AbortController();
    const leave = () => document.hidden && leaving.abort();
    document.addEventListener("visibilitychange", leave);
    try {
      const response = await open("GET", "/events", undefined, { signal: leaving.signal });
      for await (const message of events(response)) {
        pause = FIRST_PAUSE_MS;
        if (message.event) take(message.event, JSON.parse(message.data));
      }
    } catch (error) {
      if (leaving.signal.aborted) continue;
      if (error instanceof Refused && (error.status === 401 || error.status === 403)) {
        await refused(error);
        continue;
      }
      live.status = { state: "unreachable", reason: error.message };
      tell();
    } finally {
      document.removeEventListener("visibilitychange", leave);
    }
    await new Promise((go) => setTimeout(go, pause));
    pause = Math.min(2 * pause, LONGEST_PAUSE_MS);
  }
}

async function seen() {
  while (document.hidden) {
    await new Promise((go) => document.addEventListener("visibilitychange", go, { once: true }));
  }
}

function take(event, data) {
  if (event === "you") {
    live.mayTeach = data.may_teach;
    live.hasKeys = data.has_keys;
  } else if (event === "steps") {
    data.forEach(noteStep);
  } else if (event === "status") {
    const trainer = data.trainer;
    if (trainer?.job_id && trainer.steps) {
      noteStep({
        version: trainer.weights_version,
        loss: trainer.last_loss,
        changed: trainer.last_changed,
      });
    }
    live.status = data;
    tell();
  }
}
