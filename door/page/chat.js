// The conversation: answers arrive as they are computed, each with the versions that it comes from.

import { events, open } from "./api.js";
import { button, find, make, notice } from "./dom.js";
import { live, tell } from "./live.js";
import { startTeaching } from "./teach.js";

export const answered = []; // Versions of the answers, oldest first: marks on the timeline.

let turns = []; // {role, content}, as they are sent.
let running = null; // AbortController of the answer that is on its way.

export function startChat() {
  const form = find("ask");
  const question = find("question");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = question.value.trim();
    if (running || !text) return;
    question.value = "";
    ask([...turns, { role: "user", content: text }], text);
  });
  question.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !find("confirm").open) running?.abort();
  });
  find("stop").onclick = () => running?.abort();
  find("clear").onclick = clear;
  clear();
}

function clear() {
  running?.abort();
  turns = [];
  find("log").replaceChildren(
    make(
      "div",
      { class: "empty" },
      make("p", { class: "lead" }, "Ask, correct, ask again."),
      make(
        "p",
        {},
        "An answer that is not what you want can be corrected: the model learns yours while it " +
          "goes on answering. Each answer says which version of the weights it comes from.",
      ),
    ),
  );
  find("question").focus({ preventScroll: true });
}

const chosen = (id) => find(id).value.trim();

function settings() {
  const temperature = Number.parseFloat(chosen("temperature"));
  const tokens = Number.parseInt(chosen("max-tokens"), 10);
  return {
    temperature: Number.isFinite(temperature) ? temperature : 0,
    max_tokens: Number.isFinite(tokens) ? tokens : 256,
  };
}

// Shows a question and its answer; `asked` is what is sent, the last turn being the question.
async function ask(asked, text, isAgain = false) {
  if (!live.status?.model) {
    notice("The model is not there yet; its state is above.", true);
    find("question").value = text;
    return;
  }
  const log = find("log");
  log.querySelector(".empty")?.remove();
  log.append(make("article", { class: "turn user" }, make("p", { class: "said" }, text)));
  const shown = answerOf(isAgain);
  log.append(shown.element);
  log.scrollTop = log.scrollHeight;
  begin(true);
  const instruction = chosen("instruction");
  const view = instruction ? [{ role: "system", content: instruction }, ...asked] : asked;
  // What is asked again further up does not change what the conversation goes on from.
  const isNewest = turns.length === asked.length + 1 && turns.at(-2) === asked.at(-1);
  try {
    await read(view, shown);
  } catch (error) {
    if (error.name === "AbortError") {
      shown.end("stopped");
    } else {
      shown.end("broken off");
      shown.element.append(make("p", { class: "fault", role: "alert" }, error.message));
      find("question").value ||= isAgain ? "" : text;
    }
  } finally {
    begin(false);
  }
  if (!shown.text()) return;
  if (!isAgain || isNewest) turns = [...asked, { role: "assistant", content: shown.text() }];
  shown.offer(view, () => ask(asked, text, true));
}

function begin(isRunning) {
  running = isRunning ? new AbortController() : null;
  find("stop").hidden = !isRunning;
  find("send").hidden = isRunning;
  find("log").setAttribute("aria-busy", isRunning);
}

async function read(view, shown) {
  const body = { model: live.status.model, messages: view, stream: true, ...settings() };
  const headers = chosen("logging") ? { "x-reverie-log": chosen("logging") } : {};
  const more = { headers, signal: running.signal };
  const response = await open("POST", "/v1/chat/completions", body, more);
  shown.versions(response.headers.get("x-weights-version"), null);
  for await (const message of events(response)) {
    const both = message.comment?.match(/^weights_version first=(\d+) last=(\d+)/);
    if (both) shown.versions(both[1], both[2]);
    if (!message.data || message.data === "[DONE]") continue;
    const data = JSON.parse(message.data);
    if (data.error) throw new Error(data.error.message);
    shown.add(data.choices?.[0]?.delta?.content ?? "");
  }
  shown.end(null);
}

// One answer on the page, growing.
function answerOf(isAgain) {
  const said = make("p", { class: "said" });
  const version = make("span", { class: "chip" }, "\u2026");
  const note = make("span", { class: "caption" }, isAgain ? "asked again" : "");
  const acts = make("div", { class: "acts" });
  const foot = make("footer", {}, version, note, acts);
  const element = make("article", { class: "turn model", "data-running": true }, said, foot);
  const log = find("log");
  let newest = null;

  return {
    element,
    text: () => said.textContent,
    add(piece) {
      const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      said.append(piece);
      if (isAtEnd) log.scrollTop = log.scrollHeight;
    },
    versions(first, last) {
      if (first === null) return;
      const isOne = last === null || first === last;
      version.textContent = isOne ? `v${first}` : `v${first}\u2013${last}`;
      const whole = isOne ? `version ${first}` : `versions ${first} to ${last}`;
      version.title = `computed from ${whole} of the weights`;
      element.dataset.version = version.textContent;
      newest = Number(last ?? first);
    },
    end(how) {
      delete element.dataset.running;
      if (how) note.textContent = how;
      if (newest !== null) answered.push(newest);
      tell();
    },
    offer(view, again) {
      acts.replaceChildren(
        button("Ask again", () => !running && again(), { class: "quiet" }),
        live.mayTeach
          ? button(
              "Correct",
              (event) => startTeaching(element, view, said.textContent, again, event.target),
              { class: "quiet" },
            )
          : "",
      );
    },
  };
}
