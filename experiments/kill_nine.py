"""kill -9 of vLLM's engine process, of the trainer and of the ingress replica, under load.

    reverie up                                                     # in one terminal
    .venv/bin/python -m experiments.kill_nine --times 5 --json kill_nine.json

While clients stream and a teacher posts samples, one process at a time is killed. For each kill:
how long until `/readyz` says 503, and until it says 200 again. At the end the ledger is read: every
acknowledged sample is trained exactly once in the surviving history, or still queued.
"""

import contextlib
import json
import os
import signal
import sqlite3
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from experiments import frame

VICTIMS = ("engine", "trainer", "ingress")
NUM_CHATS = 3
WARM_UP_S = 4.0
READY_TIMEOUT_S = 400.0
FIND_TIMEOUT_S = 120.0
DRAIN_TIMEOUT_S = 300.0


class Load:
    """Clients that never give up: chats in a loop, and a teacher with one new sample a second."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.answers: Counter[str] = Counter()
        self.acknowledged: list[str] = []
        self._stop = threading.Event()
        self._model = httpx.get(f"{base}/v1/models", timeout=30).json()["data"][0]["id"]
        jobs = [self._chat] * NUM_CHATS + [self._teach]
        self._threads = [threading.Thread(target=job, daemon=True) for job in jobs]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _chat(self) -> None:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": "Count from one to ten."}],
            "max_tokens": 24,
            "stream": True,
        }
        url, client = f"{self.base}/v1/chat/completions", httpx.Client(timeout=60)
        while not self._stop.is_set():
            try:
                with client.stream("POST", url, json=body) as answer:
                    whole = b"".join(answer.iter_bytes())
                self.answers[outcome(answer, whole)] += 1
            except httpx.HTTPError as error:
                self.answers[type(error).__name__] += 1
            self._stop.wait(0.05)

    def _teach(self) -> None:
        number, run, client = 0, os.urandom(4).hex(), httpx.Client(timeout=30)
        while not self._stop.is_set():
            number += 1
            name = f"kill-{run}-{number}"
            sample = {"id": name, "context": f"{number} and one is", "continuation": " a number."}
            body = {"samples": [sample], "config": {"learning_rate": 1e-6}}
            try:
                answer = client.post(f"{self.base}/train", json=body)
                self.answers[f"train {outcome(answer, answer.content)}"] += 1
                if answer.status_code == 202:
                    self.acknowledged.append(name)
            except httpx.HTTPError as error:
                self.answers[f"train {type(error).__name__}"] += 1
            self._stop.wait(1.0)


def outcome(answer: httpx.Response, body: bytes) -> str:
    """What became of a request, in a word; a stream is whole if a token ended it, and no error."""
    status = answer.status_code
    if status == 503:
        return "503" if answer.headers.get("retry-after") else "503 without Retry-After"
    if status not in (200, 202):
        return f"{status} {body[:40]!r}"
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        whole = body.split(b"\n\n")[:-1]  # The last may be cut in its middle.
        events = [json.loads(event[6:]) for event in whole if event.startswith(b"data: {")]
        if any("error" in event for event in events):
            return f"{status} with an error inside"
        ends = [choice.get("finish_reason") for e in events for choice in e.get("choices", ())]
        if b"data: [DONE]" not in body or not any(ends):
            return f"{status} cut short"
    return str(status)


LOOK = httpx.Client(timeout=20)
"""One client for all looks: each new one takes some 30 ms of a core that the cell would use."""


def is_ready(base: str) -> bool:
    try:
        return LOOK.get(f"{base}/readyz").status_code == 200
    except httpx.HTTPError:
        return False


def status_of(base: str) -> dict[str, Any]:
    """`/status`, or nothing while the door does not answer."""
    try:
        status: dict[str, Any] = LOOK.get(f"{base}/status").json()
        return status
    except (httpx.HTTPError, ValueError):
        return {}


def situation(base: str) -> str:
    """What the cell says of itself, for the message of a failure."""
    status = status_of(base)
    return f"the cell says {json.dumps(status)}" if status else "the cell does not answer"


def victim_pid(status: dict[str, Any], victim: str) -> int | None:
    """The process to kill; for `engine` it is vLLM's child, not the actor.

    By its parent and not by its title, which vLLM does not always come to set.
    """
    if not status.get(victim):
        return None
    if victim != "engine":
        return int(status[victim]["pid"])
    for pid in status["engine"]["child_pids"]:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            is_direct = process.ppid() == status["engine"]["pid"]
            if is_direct and "resource_tracker" not in " ".join(process.cmdline()):
                return int(pid)
    return None


def wait_ready(base: str) -> None:
    begun = time.monotonic()
    while not is_ready(base):
        if time.monotonic() - begun > READY_TIMEOUT_S:
            raise SystemExit(f"not ready within {READY_TIMEOUT_S} s; {situation(base)}")
        time.sleep(0.2)


def kill(base: str, victim: str) -> dict[str, Any]:
    """Kill one process and wait until another one does its work and the cell is ready."""
    deadline = time.monotonic() + FIND_TIMEOUT_S
    while (
        pid := victim_pid(status_of(base), victim)
    ) is None:  # A busy door may not answer at once.
        if time.monotonic() > deadline:
            raise SystemExit(f"there is no {victim} to kill; {situation(base)}")
        time.sleep(0.2)
    os.kill(pid, signal.SIGKILL)
    begun, seen = time.monotonic(), None
    while time.monotonic() - begun < READY_TIMEOUT_S:
        ready = is_ready(base)
        if not ready and seen is None:
            seen = round(time.monotonic() - begun, 2)
        if ready and victim_pid(status_of(base), victim) not in (pid, None):
            break
        time.sleep(0.1)
    else:
        raise SystemExit(
            f"not ready within {READY_TIMEOUT_S} s after the {victim} was killed"
            f" ({'seen' if seen else 'never seen'} as not ready); {situation(base)}"
        )
    back = round(time.monotonic() - begun, 2)
    unseen = "requests waited" if seen is None else f"/readyz not 200 after {seen:.2f} s"
    frame.say(f"{victim:<8} {unseen}, ready again after {back:.2f} s")
    return {"victim": victim, "not_ready_after_s": seen, "ready_after_s": back}


def read_ledger(home: Path) -> dict[str, tuple[str, int, int]]:
    """Of each sample: state, number of surviving steps, epochs of its job."""
    (path,) = (home / "state").glob("*/ledger.sqlite")
    ledger = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    rows = ledger.execute(
        "SELECT s.id, s.state, (SELECT COUNT(*) FROM steps t WHERE t.sample_id = s.id), j.epochs "
        "FROM samples s JOIN jobs j ON j.id = s.job_id"
    ).fetchall()
    ledger.close()
    return {name: (state, steps, epochs) for name, state, steps, epochs in rows}


def check(home: Path, acknowledged: list[str]) -> dict[str, int]:
    """Raise SystemExit if an acknowledged sample is lost or was trained twice."""
    found = read_ledger(home)
    lost = [name for name in acknowledged if name not in found]
    if lost:
        raise SystemExit(f"acknowledged, but not in the ledger: {lost}")
    states: Counter[str] = Counter()
    for name in acknowledged:
        state, steps, epochs = found[name]
        states[state] += 1
        if state not in ("queued", "trained"):
            raise SystemExit(f"{name} was acknowledged and is {state}")
        if state == "trained" and steps != epochs:
            raise SystemExit(f"{name} is trained, with {steps} steps instead of {epochs}")
    return dict(states)


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument("--base", default="http://127.0.0.1:8000", help="address of the ingress")
    parser.add_argument("--home", default=os.environ.get("REVERIE_HOME", "~/.reverie"))
    parser.add_argument("--times", type=int, default=5, help="kills of each process")
    parser.add_argument("--victims", default=",".join(VICTIMS))
    parser.add_argument("--json", type=Path, help="write the summary here")
    arguments = frame.begin(parser)
    base, home = arguments.base, Path(arguments.home).expanduser()

    wait_ready(base)
    load, rows = Load(base), []
    for number in range(arguments.times):
        for victim in arguments.victims.split(","):
            time.sleep(WARM_UP_S)
            rows.append(kill(base, victim))
        if number % 2 == 0:
            saved = httpx.post(f"{base}/checkpoint", json={}, timeout=120).json()
            frame.say(f"saved    generation {saved.get('generation')}")
    load.stop()
    deadline = time.monotonic() + DRAIN_TIMEOUT_S
    while (states := check(home, load.acknowledged)).get("queued"):
        if time.monotonic() > deadline:
            raise SystemExit(f"the queue did not drain: {states}")
        time.sleep(1)
    print(f"acknowledged {len(load.acknowledged)} samples: {states}; answers {dict(load.answers)}")
    result = {"kills": rows, "samples": states, "answers": dict(load.answers)}
    frame.keep(arguments.json, arguments, result)


if __name__ == "__main__":
    main()
