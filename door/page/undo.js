// Going back: forgetting a sample, returning to a generation. Each says what it will do, and did.

import { ask } from "./api.js";
import { confirm } from "./confirm.js";
import { many, notice, when } from "./dom.js";
import { live } from "./live.js";

const MAX_SHOWN = 6;

// `parent` is the newest generation known not to hold it, or null.
export async function forget(item, parent) {
  const to = parent
    ? `generation ${parent.generation} (version ${parent.weights_version}, ${when(parent.created)})`
    : "the newest generation from before its first step";
  const words = [
    `${item.id}${item.source ? `, from ${item.source}` : ""}, is undone and never learned again.`,
    `The weights of ${to} become live, as a new generation. Everything else that was learned ` +
      "since is queued, and learned again without it.",
    "Nobody can return to a generation that has learned it. Answers go on meanwhile; the " +
      "trainer stands still for some seconds.",
  ];
  if (!(await confirm("Forget this sample?", words, "Forget it"))) return;
  await act("Forgetting", () => ask("POST", "/forget", { item: item.id }), (done) =>
    done.generation === null
      ? `${done.item} was not in the weights, and is forgotten.`
      : `${done.item} is forgotten: generation ${done.generation} has the weights of ` +
        `${done.returned_to}. ${many(done.undone_steps, "step")} undone, ` +
        `${done.steps_to_learn_again} of them learned again.`,
  );
}

// `undone` are the ids of what was learned since, as far as they are known.
export async function rollBack(generation, undone) {
  const after = `Everything learned after version ${generation.weights_version} is undone`;
  const named = undone.slice(0, MAX_SHOWN).join(", ");
  const rest = undone.length - MAX_SHOWN;
  const which = undone.length ? `: ${named}${rest > 0 ? ` and ${rest} more` : ""}` : "";
  const words = [
    `The weights of generation ${generation.generation} (version ${generation.weights_version}, ` +
      `${when(generation.created)}) become live, as a new generation.`,
    `${after}${which}. It is not learned again, unless it is posted again.`,
    "What is live now is kept as a generation first, so that there is a way back. Answers go on " +
      "meanwhile; the trainer stands still for some seconds.",
  ];
  if (!(await confirm(`Roll back to generation ${generation.generation}?`, words, "Roll back"))) {
    return;
  }
  const body = { generation: generation.generation };
  await act("Rolling back", () => ask("POST", "/rollback", body), (made) =>
    `Generation ${made.generation} has the weights of ${generation.generation}, and is live ` +
      `and public as version ${made.weights_version}.`,
  );
}

// Says that it is under way, then what came of it.
export async function act(doing, work, done) {
  notice(`${doing}\u2026`);
  try {
    notice(done(await work()));
  } catch (error) {
    notice(`${doing} was refused: ${error.message}`, true);
  }
  for (const again of afterwards) again(live);
}

const afterwards = [];

// `again(live)` is called when something was undone, kept or decided.
export function whenChanged(again) {
  afterwards.push(again);
}
