// The field for a key: shown where the door wants one, kept in this tab's session only.

import { keep, key } from "./api.js";
import { find } from "./dom.js";

// Resolves when another key has been entered.
export function askForKey(error) {
  const form = find("key");
  const field = find("key-value");
  if (key() || error.status === 403) find("key-words").textContent = error.message;
  keep(null);
  form.hidden = false;
  find("desk").hidden = true;
  find("leave").hidden = true;
  find("health").dataset.state = "locked";
  find("health-words").textContent = "locked";
  field.focus();
  return new Promise((entered) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      keep(field.value.trim());
      field.value = "";
      form.hidden = true;
      find("desk").hidden = false;
      find("leave").hidden = false;
      entered();
    };
  });
}

export function startKey() {
  find("leave").hidden = !key();
  find("leave").onclick = () => {
    keep(null);
    location.reload();
  };
}
