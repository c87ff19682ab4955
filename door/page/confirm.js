// Asks before something is undone, and says what it will do; Cancel has the focus.

import { find, make } from "./dom.js";

// Resolves to whether it was confirmed.
export function confirm(title, words, verb) {
  const dialog = find("confirm");
  find("confirm-title").textContent = title;
  find("confirm-words").replaceChildren(...words.map((each) => make("p", {}, each)));
  find("confirm-yes").textContent = verb;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((decided) => {
    dialog.addEventListener("close", () => decided(dialog.returnValue === "yes"), { once: true });
  });
}
