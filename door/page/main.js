// Puts the page together: parts render what `live` tells, and ask the door for the rest.

import { startCandidates } from "./candidates.js";
import { startChat } from "./chat.js";
import { find, make } from "./dom.js";
import { startDreams } from "./dreams.js";
import { askForKey, startKey } from "./key.js";
import { startLearned } from "./learned.js";
import { follow, listen } from "./live.js";
import { startState } from "./state.js";
import { startTabs } from "./tabs.js";
import { startTimeline } from "./timeline.js";

startKey();
startTabs(find("tabs"));
startState();
startTimeline();
startChat();
startLearned();
startCandidates();
startDreams();

listen(({ status, mayTeach }) => {
  if (mayTeach || status.state !== "ready") return;
  for (const id of ["learned", "candidates", "dreams"]) {
    find(id).replaceChildren(
      make("p", { class: "hint" }, "This key may ask and look. To see what was learned, and to " +
        "teach, open the page with one that ",
        make("code", {}, "reverie keys add --scope teach"), " has printed."),
    );
  }
});

follow(askForKey);
