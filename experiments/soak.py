"""Half an hour of everything at once, while processes are killed: what clients see, what is lost.

    .venv/bin/python -m experiments.soak --json soak.json --plot docs/soak.png          # 30 min
    RAY_AUTH_MODE=token ray job submit --working-dir . -- python -m experiments.soak --minutes 5

A cell of its own. In every other half minute three clients chat and a fourth teaches a sample every
two seconds; the other half minutes are quiet, so that dreams go on. A fifth commits or publishes
every minute, a sixth asks for a dream every minute. Meanwhile one process is killed (SIGKILL) at
random moments: vLLM's engine, each of the four actors, the ingress, Serve's proxy and controller,
in a random order of which each comes once before any comes twice. In the last `--calm` minutes all
but the kills goes on.

    restart window    from a kill until /readyz says 200 and the killed process has a successor
    availability      of requests that overlap no window: all must be answered as without any kill,
                      streams to their end and without an error inside; and of chats that overlap
                      one of the trainer, the checkpoint or the dream actor, which the engine and
                      all streams survive
    lost              samples that were acknowledged, and are neither trained once nor queued
    memory            private bytes of each process of the cell, and of Ray; the slope of each over
                      the calm minutes but the first, by least squares

Ends with an error if anything outside a window failed, or was never asked there; if anything
acknowledged was lost; and if a victim was never killed. What was seen until then is kept.
"""

import argparse
import contextlib
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import psutil

from actors.footprint import footprint
from actors.settings import DEFAULT_MODEL
from apollo.weights.adopt import adopt
from command import record
from experiments import frame
from experiments.cells import running_cell
from experiments.kill_nine import check, is_ready, outcome, victim_pid

OF_STATUS: Final = ("engine", "trainer", "checkpoint", "dream", "ingress")
OF_SERVE: Final = {"proxy": "ray::ProxyActor", "controller": "ray::ServeController"}
"""What `ps` calls them."""
ACTOR: Final = "engine actor"
"""The process around vLLM's; `engine` is vLLM's own."""
VICTIMS: Final = (*OF_STATUS, ACTOR, *OF_SERVE)
UNNOTICED: Final = ("trainer", "checkpoint", "dream")
"""Whose end no chat may notice."""
NUM_CHATS: Final = 3
BURST_S: Final = 30.0
WINDOW_LIMIT_S: Final = 240.0
LOOK_S: Final = 10.0
"""Between two looks at the memory."""
SETTLE_S: Final = 60.0
"""Of the calm minutes, left out of the slopes: caches fill."""
FEWEST_POINTS: Final = 6
"""For a slope."""
MB: Final = 1e6
NUM_DRAWN: Final = 9
"""Roles in the picture, the largest."""
DRAIN_TIMEOUT_S: Final = 300.0
CLIENT_TIMEOUT_S: Final = 120.0
BEHAVIOUR: Final = {
    "name": "soak-short",
    "instruction": "Always answer in exactly one short sentence of at most 15 words.",
    "checks": {"min_words": 3, "max_words": 20},
    "max_tokens": 32,
}
SMALL: Final = {
    "dream.scenarios": 4,
    "dream.held_out": 4,
    "dream.min_kept": 1,
    "dream.canaries": 8,
    "dream.yield_s": 0.2,
}


def is_quiet() -> bool:
    """Whether nobody chats or teaches now: a dream waits for everybody."""
    return int(frame.seconds() / BURST_S) % 2 == 1


@dataclass(frozen=True)
class Answer:
    """One request, in seconds since the beginning."""

    what: str
    begun: float
    ended: float
    outcome: str


@dataclass
class Window:
    """From a kill until all is as before."""

    victim: str
    begun: float
    ended: float = float("inf")

    def overlaps(self, answer: Answer) -> bool:
        return answer.begun <= self.ended and answer.ended >= self.begun


class NotBack(Exception):
    """A killed process has no successor in time."""


@dataclass
class Soak:
    """Clients of one cell, and what they saw."""

    base: str
    answers: list[Answer] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)
    memory: list[tuple[str, int, float, int]] = field(default_factory=list)
    """Role, process id, seconds, private bytes."""
    model: str = ""
    num_checkpoints: int = 0
    is_over: threading.Event = field(default_factory=threading.Event)
    broken: list[str] = field(default_factory=list)
    """Why clients have ended before their time."""

    def loop(self, act: Callable[[httpx.Client], None], pause_s: float) -> None:
        try:
            with httpx.Client(base_url=self.base, timeout=CLIENT_TIMEOUT_S) as client:
                while not self.is_over.is_set():
                    act(client)
                    self.is_over.wait(pause_s)
        except Exception as error:
            self.broken.append(f"{getattr(act, '__name__', 'look')}: {error!r}")

    @contextlib.contextmanager
    def answering(self, what: str) -> Iterator[Callable[[str], None]]:
        """Note one request; the block says its outcome."""
        begun, said = frame.seconds(), ["nothing"]
        try:
            yield lambda outcome: said.__setitem__(0, outcome)
        except httpx.HTTPError as error:
            said[0] = type(error).__name__
        self.answers.append(Answer(what, begun, frame.seconds(), said[0]))

    def chat(self, client: httpx.Client) -> None:
        if is_quiet():
            return
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": "Count from one to ten."}],
            "max_tokens": 24,
            "stream": True,
        }
        with self.answering("chat") as say:
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                whole = b"".join(answer.iter_bytes())
            say(outcome(answer, whole))

    def teach(self, client: httpx.Client) -> None:
        if is_quiet():
            return
        name = f"soak-{len(self.answers)}-{os.urandom(3).hex()}"
        sample = {"id": name, "context": f"{name} is", "continuation": " a number."}
        body = {"samples": [sample], "config": {"learning_rate": 1e-6}}
        with self.answering("teach") as say:
            answer = client.post("/train", json=body)
            say(outcome(answer, answer.content))
            if answer.status_code == 202:
                self.acknowledged.append(name)

    def commit(self, client: httpx.Client) -> None:
        is_public = self.num_checkpoints % 2 == 1
        self.num_checkpoints += 1
        with self.answering("publish" if is_public else "commit") as say:
            answer = client.post("/checkpoint", json={"publish": is_public})
            is_early = answer.status_code == 503 and "is on trial" in answer.text
            say(ON_TRIAL if is_early else outcome(answer, answer.content))

    def dream(self, client: httpx.Client) -> None:
        with self.answering("dream") as say:
            answer = client.post("/dream", json={"rounds": 1, "behaviour": BEHAVIOUR["name"]})
            say(outcome(answer, answer.content))

    def look(self, up_pid: int) -> None:
        """Note the memory of whatever `reverie up` has started and not ended."""
        up = psutil.Process(up_pid)
        for each in (up, *up.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # It has just ended.
                role = role_of(each.cmdline())
                if role is not None and (size := footprint([each.pid])) is not None:
                    seen = (role, each.pid, frame.seconds(), size.private_bytes)
                    self.memory.append(seen)

    def begin(self, up_pid: int) -> list[threading.Thread]:
        self.model = httpx.get(f"{self.base}/v1/models", timeout=60).json()["data"][0]["id"]
        made = httpx.put(f"{self.base}/behaviours/{BEHAVIOUR['name']}", json=BEHAVIOUR, timeout=60)
        assert made.status_code < 300, made.text
        tasks: list[tuple[Callable[[httpx.Client], None], float]]
        tasks = [(self.chat, 0.05)] * NUM_CHATS
        tasks += [(self.teach, 2.0), (self.commit, 60.0), (self.dream, 60.0)]
        tasks.append((lambda _: self.look(up_pid), LOOK_S))
        threads = [threading.Thread(target=self.loop, args=task, daemon=True) for task in tasks]
        for thread in threads:
            thread.start()
        return threads

    def kill(self, victim: str, pid: int, find: Callable[[str], int | None]) -> None:
        """Kill it, and wait until the cell is as before."""
        window = Window(victim, frame.seconds())
        self.windows.append(window)
        with contextlib.suppress(ProcessLookupError):  # It has just gone by itself.
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + WINDOW_LIMIT_S
        while find(victim) in (pid, None) or not is_ready(self.base):
            if time.monotonic() > deadline:
                raise NotBack(f"{victim} was killed, and is not back in {WINDOW_LIMIT_S:.0f} s")
            time.sleep(0.2)
        window.ended = frame.seconds()
        frame.say(f"{victim}: back after {window.ended - window.begun:.1f} s")

    def outside(self) -> Counter[str]:
        """Outcomes of what overlaps no window."""
        return Counter(
            f"{each.what} {each.outcome}"
            for each in self.answers
            if not any(window.overlaps(each) for window in self.windows)
        )

    def chats_within(self) -> dict[str, dict[str, int]]:
        """By victim, outcomes of the chats that overlap its windows and no other's."""
        found: dict[str, Counter[str]] = {}
        for each in self.answers:
            victims = {window.victim for window in self.windows if window.overlaps(each)}
            if each.what == "chat" and len(victims) == 1:
                found.setdefault(victims.pop(), Counter())[each.outcome] += 1
        return {victim: dict(seen) for victim, seen in found.items()}


ON_TRIAL: Final = "503, a dream is on trial"
"""Why a checkpoint is refused without any restart; a fault all the same, but one that is named."""
EXPECTED: Final = {"chat 200", "teach 202", "commit 200", "publish 200", "dream 202"}


def role_of(command: Sequence[str]) -> str | None:
    """What `ps` calls a process, in a word; None for Ray's workers that wait for work."""
    title = command[0] if command else ""
    if title.startswith("ray::"):
        name = title.removeprefix("ray::").partition(".")[0].split(":")[0].split("(")[0].strip()
        return None if name == "IDLE" else name
    scripts = [Path(part).stem for part in command if part.endswith(".py")]
    return scripts[0] if scripts else Path(title.partition(" ")[0]).name or None


def slopes(memory: Sequence[tuple[str, int, float, int]], since: float) -> dict[str, float]:
    """MB per minute of each process that was looked at often enough; the largest of a role."""
    found: dict[str, float] = {}
    for role, pid in dict.fromkeys((role, pid) for role, pid, _, _ in memory):
        points = [
            (at / 60, size / MB) for *who, at, size in memory if who == [role, pid] and at >= since
        ]
        if len(points) < FEWEST_POINTS:
            continue
        middle = [sum(axis) / len(points) for axis in zip(*points, strict=True)]
        over = sum((x - middle[0]) * (y - middle[1]) for x, y in points)
        slope = over / sum((x - middle[0]) ** 2 for x, _ in points)
        found[role] = max(slope, found.get(role, slope))
    return found


def finder(base: str, up_pid: int) -> Callable[[str], int | None]:
    """Which process plays a part now, among those that the cell has started."""
    client = httpx.Client(base_url=base, timeout=20)

    def find(victim: str) -> int | None:
        if victim in OF_SERVE:
            family = psutil.Process(up_pid).children(recursive=True)
            for each in family:
                with contextlib.suppress(psutil.Error):
                    if (each.cmdline() or [""])[0].startswith(OF_SERVE[victim]):
                        return int(each.pid)
            return None
        try:
            status: dict[str, Any] = client.get("/status").json()
        except (httpx.HTTPError, ValueError):
            return None
        if victim == ACTOR:
            engine = status.get("engine")
            return None if engine is None else int(engine["pid"])
        return victim_pid(status, victim)

    return find


def draw(path: str, soak: Soak) -> None:
    """Private memory of the largest processes over time, the restart windows behind it."""
    figure = frame.figure(11, 4.5)
    axes = figure.subplots()
    for window in soak.windows:
        axes.axvspan(window.begun / 60, window.ended / 60, color="#dddddd", linewidth=0)
        axes.annotate(
            window.victim,
            (window.begun / 60, 1),
            (2, -4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            rotation=90,
            va="top",
            fontsize=7,
        )
    lives: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for role, pid, at, size in soak.memory:
        lives.setdefault((role, pid), []).append((at / 60, size / MB))
    largest: dict[str, float] = {}
    for (role, _), points in lives.items():
        largest[role] = max(largest.get(role, 0), *(size for _, size in points))
    shown = sorted(largest, key=largest.__getitem__, reverse=True)[:NUM_DRAWN]
    for (role, _), points in lives.items():
        if role in shown:
            axes.plot(*zip(*points, strict=True), ".-", color=f"C{shown.index(role)}")
    for number, role in enumerate(shown):
        axes.plot([], [], color=f"C{number}", label=role)
    axes.set(xlabel="minutes", ylabel="private memory, MB", ylim=(0, None))
    figure.legend(fontsize=8, loc="outside right center")
    frame.draw_to(path, figure)


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=26, help="of load")
    parser.add_argument("--calm", type=float, default=6, help="minutes of these without a kill")
    parser.add_argument(
        "--pause", type=float, default=30, help="mean seconds from a recovery to the next kill"
    )
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=list(VICTIMS))
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a directory or hub id")
    parser.add_argument("--json", type=Path, help="write the summary here")
    parser.add_argument("--plot", help="write the picture to this file (needs matplotlib)")
    options = frame.begin(parser)
    if not 0 < options.calm < options.minutes:
        raise SystemExit(f"--calm {options.calm:g}: between 0 and --minutes, {options.minutes:g}")
    with tempfile.TemporaryDirectory(prefix="reverie-soak-") as place:
        home = Path(place) / "cell"
        directory = adopt(options.model, Path(place), "float32", frame.say).directory
        with running_cell(directory, SMALL, home) as base:
            soak = Soak(base)
            found = run(soak, home, options)
    frame.keep(options.json, options, found | {"memory": soak.memory})
    for name, value in found.items():
        print(f"{name}: {value}")
    if options.plot:
        draw(options.plot, soak)
    if wrong := faults(found):
        raise SystemExit("\n".join(wrong))


def run(soak: Soak, home: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Load and kills, then load alone, then the end of the queue; what was seen."""
    rng, own = random.Random(options.seed), record.read(home, int(soak.base.rpartition(":")[2]))
    assert own is not None
    find, troubles = finder(soak.base, own.pid), []
    threads, begun = soak.begin(own.pid), frame.seconds()
    last_kill = begun + 60 * (options.minutes - options.calm)
    order: list[str] = []
    try:
        while (pause := rng.uniform(0.5, 1.5) * options.pause) + frame.seconds() < last_kill:
            time.sleep(pause)
            order = order or rng.sample(options.victims, len(options.victims))
            pid = find(order[-1])
            if pid is not None:
                soak.kill(order.pop(), pid, find)
        frame.say("calm")
        calm = frame.seconds()
        time.sleep(60 * options.calm)
    except NotBack as error:
        troubles, calm = [str(error)], frame.seconds()
    minutes = (frame.seconds() - begun) / 60
    soak.is_over.set()
    for thread in threads:
        thread.join(CLIENT_TIMEOUT_S + LOOK_S)
    for window in soak.windows:  # One that never ended has lasted until now.
        window.ended = min(window.ended, frame.seconds())
    troubles += soak.broken + ["a client did not end"] * sum(each.is_alive() for each in threads)
    states: dict[str, int] = {}
    deadline = time.monotonic() + DRAIN_TIMEOUT_S
    try:
        while (states := check(home, soak.acknowledged)).get("queued"):
            if time.monotonic() > deadline:
                raise SystemExit("the queue did not drain")
            time.sleep(1)
        rounds = httpx.get(f"{soak.base}/dream/rounds", timeout=60).json()["data"]
        generations = httpx.get(f"{soak.base}/checkpoints", timeout=60).json()["data"]
    except (SystemExit, httpx.HTTPError) as error:
        troubles, rounds, generations = [*troubles, str(error)], [], []
    away = sum(each.ended - each.begun for each in soak.windows)
    return {
        "minutes": round(minutes, 1),
        "answers": dict(Counter(f"{each.what} {each.outcome}" for each in soak.answers)),
        "outside_windows": dict(soak.outside()),
        "chats_within_windows": soak.chats_within(),
        "never_killed": sorted({*options.victims} - {each.victim for each in soak.windows}),
        "windows": [[each.victim, each.begun, each.ended] for each in soak.windows],
        "window_share": round(away / 60 / minutes, 3),
        "acknowledged": len(soak.acknowledged),
        "samples": states,
        "dream_rounds": dict(Counter(each["state"] for each in rounds)),
        "generations": len(generations),
        "slope_mb_per_minute": slopes(soak.memory, calm + SETTLE_S),
        "troubles": troubles,
    }


def faults(found: dict[str, Any]) -> list[str]:
    """Why this was no good run; empty if it was one."""
    wrong = list(found["troubles"])
    if found["never_killed"]:
        names = ", ".join(found["never_killed"])
        wrong.append(f"never killed: {names}; give it more --minutes, or less --pause")
    outside = found["outside_windows"]
    if bad := {name: count for name, count in outside.items() if name not in EXPECTED}:
        wrong.append(f"outside every restart window: {bad}")
    for victim in UNNOTICED:
        seen = set(found["chats_within_windows"].get(victim, {}))
        if seen - {"200"}:
            wrong.append(f"while the {victim} restarted, chats ended with {sorted(seen)}")
    if missing := EXPECTED - set(outside):
        wrong.append(f"never seen outside a restart window: {sorted(missing)}")
    return wrong


if __name__ == "__main__":
    main()
