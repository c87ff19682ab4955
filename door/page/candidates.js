// Candidates: what was answered under an instruction, beside what the model says without it.

import { ask } from "./api.js";
import { busy, button, find, make, many, show, when } from "./dom.js";
import { watch } from "./live.js";
import { act, whenChanged } from "./undo.js";

const MAX_DECIDED = 20;

let all = [];

export function startCandidates() {
  const load = watch(({ dream }) => [dream?.proposed, dream?.unscored], read);
  whenChanged(load);
}

async function read() {
  all = (await ask("GET", "/candidates")).data;
  const open = all.filter((each) => each.state === "proposed");
  const count = find("num-candidates");
  count.textContent = open.length;
  count.hidden = !open.length;
  count.setAttribute("aria-label", `${open.length} to decide`);
  const decided = all.filter((each) => each.state !== "proposed").slice(0, MAX_DECIDED);
  show(
    find("candidates"),
    open.length ? null : none(),
    ...open.map(card),
    decided.length
      ? make(
          "details",
          { class: "more", "data-id": "decided" },
          make("summary", {}, many(decided.length, "decided one")),
          make("ul", { class: "items" }, ...decided.map(line)),
        )
      : null,
  );
}

function none() {
  return make(
    "p",
    { class: "hint" },
    "Nothing to decide. Chats with an instruction in view become candidates when they are logged " +
      "(Options under the question, or the setting dream.log_conversations) and the instruction " +
      "made their answer likelier.",
  );
}

function card(each) {
  const question = each.turns.at(-1).content;
  const before = each.turns.slice(0, -1);
  const title = `candidate-${each.id}`;
  return make(
    "article",
    { class: "candidate", "aria-labelledby": title },
    make("h3", { id: title }, question),
    before.length
      ? make(
          "details",
          { "data-id": `view-${each.id}` },
          make("summary", {}, "What was in view"),
          ...before.map((turn) =>
            make(
              "p",
              { class: "context" },
              make("b", {}, turn.strip === true ? "instruction " : `${turn.role} `),
              turn.content,
            ),
          ),
        )
      : null,
    make(
      "div",
      { class: "pair" },
      answer("With the instruction", "This would be learned", each.answer, "would"),
      answer("Without it", "What the model says now", each.plain, ""),
    ),
    make(
      "footer",
      { class: "row" },
      make(
        "span",
        { class: "caption" },
        `${each.divergence.toFixed(2)} nats per token apart \u00b7 v${each.weights_version} ` +
          `\u00b7 ${when(each.created)}`,
      ),
      button("Reject", (event) => decide(each, "reject", event.target), {
        "data-mark": `reject-${each.id}`,
      }),
      button("Approve", (event) => decide(each, "approve", event.target), {
        class: "main",
        "data-mark": `approve-${each.id}`,
      }),
    ),
  );
}

function answer(title, hint, text, kind) {
  return make(
    "div",
    { class: `side-by ${kind}` },
    make("h4", {}, title, make("span", { class: "caption" }, hint)),
    make("p", { class: "said" }, text),
  );
}

function line(each) {
  const how = each.is_automatic ? "by itself" : "by a person";
  const words = [how, each.job_id, each.reason].filter(Boolean).join(" \u00b7 ");
  return make(
    "li",
    { class: "item" },
    make(
      "div",
      { class: "what" },
      make("span", {}, each.turns.at(-1).content),
      make("span", { class: "caption" }, words),
    ),
    make("span", { class: each.state === "trained" ? "tag good" : "tag" }, each.state),
  );
}

function decide(each, decision, element) {
  return busy(element, () =>
    act("Deciding", () => ask("POST", `/candidates/${each.id}`, { decision }), (made) =>
      made.state === "rejected"
        ? "Rejected; it is not learned."
        : `Approved; it is learned once, without its instruction: ${made.job_id ?? "soon"}.`,
    ),
  );
}
