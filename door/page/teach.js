// Correcting an answer: yours becomes a sample, and its job is shown until it has been learned.

import { ask, events, open } from "./api.js";
import { busy, button, clip, loss, make, many } from "./dom.js";
import { live, noteJob, tell } from "./live.js";
import { curve } from "./plot.js";
import { forget } from "./undo.js";

const EPOCHS = 12;
const LEARNING_RATE = 2e-5;
const WARMUP_STEPS = 5;
const ENDED = ["done", "failed", "cancelled"];

export const taught = new Map(); // What this page taught: sample id -> words, for the list.

// Opens the form under an answer; `view` is what was asked, `again` asks it once more.
export function startTeaching(article, view, answer, again, opener) {
  article.querySelector("form")?.remove();
  const hasInstruction = view[0].role === "system";
  const text = make("textarea", { rows: 3, required: true });
  text.value = answer.trim();
  const epochs = make("input", { type: "number", min: 1, max: 200, value: EPOCHS });
  const rate = make("input", { type: "number", min: 1e-7, max: 1e-2, step: "any" });
  rate.value = LEARNING_RATE;
  const strip = make("input", { type: "checkbox", checked: true });
  const form = make(
    "form",
    { class: "teach" },
    make("label", {}, "What it should have said", text),
    hasInstruction ? make("label", { class: "check" }, strip, "Learn it without the instruction")
      : null,
    make(
      "div",
      { class: "row" },
      make(
        "details",
        { class: "options" },
        make("summary", {}, "How"),
        make(
          "div",
          { class: "fields" },
          make("label", {}, "Passes", epochs),
          make("label", {}, "Learning rate", rate),
        ),
      ),
      button("Cancel", () => {
        form.remove();
        opener.focus();
      }),
      make("button", { class: "main" }, "Teach"),
    ),
    make("p", { class: "fault", role: "alert" }),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const sample = {
      id: newId(),
      source: "page",
      messages: [...view, { role: "assistant", content: text.value.trim() }],
      strip: hasInstruction && strip.checked ? ["system"] : [],
    };
    const config = {
      epochs: Number(epochs.value),
      learning_rate: Number(rate.value),
      warmup_steps: WARMUP_STEPS,
    };
    const question = view.at(-1).content;
    busy(form.querySelector(".main"), async () => {
      try {
        const job = await ask("POST", "/train", { samples: [sample], config });
        taught.set(sample.id, `${clip(question, 40)} \u2192 ${clip(text.value, 60)}`);
        const shown = progressOf(sample, again);
        form.replaceWith(shown.element);
        await followJob(job.job_id, shown);
      } catch (error) {
        form.querySelector(".fault").textContent = error.message;
      }
    });
  });
  article.append(form);
  text.focus();
}

// Not crypto.randomUUID: that is only there for https and for this machine.
function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(6));
  return `page-${Array.from(bytes, (each) => each.toString(16).padStart(2, "0")).join("")}`;
}

async function followJob(jobId, shown) {
  while (true) {
    try {
      for await (const message of events(await open("GET", `/train/jobs/${jobId}/events`))) {
        if (message.event !== "job") continue;
        const job = JSON.parse(message.data);
        noteJob(job);
        tell();
        shown.update(job);
        if (ENDED.includes(job.status)) return;
      }
    } catch (error) {
      shown.wait(error.message);
      if (error.status === 404 || error.status === 401 || error.status === 403) return;
    }
    await new Promise((go) => setTimeout(go, 2000)); // The cell restarts by itself.
  }
}

function progressOf(sample, again) {
  const words = make("p", { class: "progress-words", "aria-live": "polite" }, "Queued");
  const bar = make("progress", { max: 1, value: 0, "aria-label": "Steps learned" });
  const line = make("div", { class: "spark" });
  const acts = make("div", { class: "acts" });
  const element = make("div", { class: "lesson" }, words, bar, line, acts);
  element.dataset.sample = sample.id;
  return {
    element,
    wait(why) {
      words.textContent = why;
    },
    update(job) {
      bar.max = job.total_steps;
      bar.value = job.steps;
      words.setAttribute("aria-live", ENDED.includes(job.status) ? "polite" : "off");
      const last = job.loss_history.at(-1);
      const at = `step ${job.steps} of ${job.total_steps}`;
      element.dataset.status = job.status;
      line.replaceChildren(curve(job.loss_history, job.total_steps));
      if (job.status === "done") {
        const first = loss(job.loss_history[0]);
        words.textContent =
          `Learned in ${many(job.steps, "step")}, version ${job.weights_version}: ` +
          `loss ${first} to ${loss(last)}`;
        acts.replaceChildren(
          button("Ask again", again, { class: "main" }),
          button("Forget it", () => forget({ id: sample.id, source: sample.source }, null), {
            class: "quiet",
          }),
        );
      } else if (job.status === "failed" || job.status === "cancelled") {
        words.textContent = `${job.status}: ${job.error ?? at}`;
        acts.replaceChildren();
      } else {
        words.textContent = job.steps ? `Learning: ${at}, loss ${loss(last)}` : waiting();
        acts.replaceChildren(
          button("Cancel", (event) => cancel(job.job_id, event.target, words), { class: "quiet" }),
        );
      }
    },
  };
}

function waiting() {
  const paused = live.status?.trainer?.paused;
  return paused ? `Queued; training is paused: ${paused}` : "Queued";
}

async function cancel(jobId, element, words) {
  try {
    await busy(element, () => ask("DELETE", `/train/jobs/${jobId}`));
  } catch (error) {
    words.textContent = error.message;
  }
}
