// Tabs as the ARIA practices describe them: one stop for the Tab key, arrows between them.

export function startTabs(list) {
  const tabs = [...list.querySelectorAll('[role="tab"]')];

  function choose(tab, isFocused) {
    for (const each of tabs) {
      const isChosen = each === tab;
      each.setAttribute("aria-selected", isChosen);
      each.tabIndex = isChosen ? 0 : -1;
      document.getElementById(each.getAttribute("aria-controls")).hidden = !isChosen;
    }
    if (isFocused) tab.focus();
  }

  list.addEventListener("click", (event) => {
    const tab = event.target.closest('[role="tab"]');
    if (tab) choose(tab, false);
  });
  list.addEventListener("keydown", (event) => {
    const at = tabs.indexOf(document.activeElement);
    const goal = {
      ArrowRight: (at + 1) % tabs.length,
      ArrowLeft: (at + tabs.length - 1) % tabs.length,
      Home: 0,
      End: tabs.length - 1,
    }[event.key];
    if (at < 0 || goal === undefined) return;
    event.preventDefault();
    choose(tabs[goal], true);
  });
  choose(tabs[0], false);
}
