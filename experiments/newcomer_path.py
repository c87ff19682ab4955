"""A newcomer's first minutes: clone, `make serve`, open /ui, correct an answer, roll it back.

    .venv/bin/python -m experiments.newcomer_path --json newcomer.json      # 10 min at most

A fresh clone of what is committed here, an empty home, no environment of Python, and no cache of
packages. Then a real Chromium does what somebody would do, through the page alone. Each
step is timed from the beginning; what is asked is checked. Ends with an error where a step fails.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from playwright.sync_api import expect

from experiments import frame
from experiments.cells import end, free_port, is_ready
from tests.browser import NAMES, answer, ask, chromium, watched

ROOT: Final = Path(__file__).parents[1]
QUESTION: Final = "What is your name?"
CORRECTION: Final = "I am Reverie, and I learn while I answer."
BOOT_TIMEOUT_S: Final = 1500
LEARN_MS: Final = 300_000


def environment(place: Path) -> dict[str, str]:
    """What a new user's shell has: an empty home, the system's programs, where packages are."""
    dropped = ("REVERIE_", "RAY_", "PYTHON", "XDG_", "VIRTUAL_ENV", "HOME", "PATH")
    made = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    own = Path(sys.prefix) / "bin"
    path = [each for each in os.environ["PATH"].split(os.pathsep) if Path(each) != own]
    home = place / "home"
    home.mkdir()
    made |= {"HOME": str(home), "PATH": os.pathsep.join(path), "PIP_NO_CACHE_DIR": "1"}
    packages = Path.home() / ".config" / "pip" / "pip.conf"
    if packages.exists() and "PIP_CONFIG_FILE" not in made:
        made["PIP_CONFIG_FILE"] = str(packages)
    return made


def wait_until_ready(serve: subprocess.Popen[bytes], base: str, log: Path) -> None:
    deadline = time.monotonic() + BOOT_TIMEOUT_S
    while not is_ready(base):
        if serve.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"make serve did not come up:\n{log.read_text()}")
        time.sleep(0.5)


class Steps:
    """When each was done, in seconds since the clone was begun."""

    def __init__(self) -> None:
        self._begun, self.done = time.monotonic(), dict[str, float]()

    def did(self, what: str) -> None:
        self.done[what] = round(time.monotonic() - self._begun, 1)
        frame.say(f"{what}: at {self.done[what]:.0f} s")


def teach_and_return(base: str, steps: Steps) -> None:
    """Through the page: ask, correct, see it learned, roll it back."""
    with chromium() as browser, watched(browser, base) as (page, seen):
        steps.did("page open")
        before = ask(page, QUESTION)
        assert before and before != CORRECTION, before
        steps.did("asked")
        page.get_by_role("button", name="Correct").first.click()
        page.get_by_label("What it should have said").fill(CORRECTION)
        page.get_by_role("button", name="Teach").click()
        lesson = page.locator(".lesson")
        lesson.and_(page.locator("[data-status=done]")).wait_for(timeout=LEARN_MS)
        steps.did("learned")
        lesson.get_by_role("button", name="Ask again").click()
        assert (now := answer(page, 1)) == CORRECTION, now
        steps.did("asked again: the correction, word for word")
        page.get_by_role("button", name="Roll back to generation 0").click()
        page.get_by_role("dialog").get_by_role("button", name="Roll back").click()
        expect(page.locator("#notice")).to_contain_text("has the weights of 0", timeout=LEARN_MS)
        steps.did("rolled back")
        assert (now := ask(page, QUESTION)) != CORRECTION, now
        steps.did("asked again: the correction is gone")
        seen.check()


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument("--json", type=Path, help="write the summary here")
    options = frame.begin(parser)
    if not any(map(shutil.which, NAMES)):
        raise SystemExit("there is no Chromium here; on Debian: apt-get install chromium")
    steps, port = Steps(), free_port()
    base = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="reverie-newcomer-") as made:
        place = Path(made)
        clone, log = place / "reverie", place / "serve.log"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        with log.open("wb") as out:
            serve = subprocess.Popen(
                ["make", "serve", f"PORT={port}"],
                cwd=clone,
                env=environment(place),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            wait_until_ready(serve, base, log)
            steps.did("ready")
            teach_and_return(base, steps)
        finally:
            end(serve)
        steps.did("stopped")
    frame.keep(options.json, options, {"steps": steps.done})


if __name__ == "__main__":
    main()
