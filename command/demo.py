"""`reverie demo`: the proof, against a running server, with the official `openai` client.

ask -> stream a long answer -> teach one example under the stream -> ask again -> look at memory
"""

import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import httpx
from openai import OpenAI, OpenAIError

from actors.errors import ReverieError
from command.client import Unreachable
from command.picture import Recording, draw

QUESTION: Final = "What is your name?"
ANSWER: Final = "My name is Reverie, and I learn while I serve."
LONG_PROMPT: Final = "Write a long story about a lighthouse keeper and the sea. Describe every day."
TRAINING: Final = {"epochs": 12, "learning_rate": 2e-5, "warmup_steps": 5}
IDLE_TOKENS: Final = 40
MAX_STREAM_TOKENS: Final = 1500
JOB_TIMEOUT_S: Final = 600
MIB: Final = 2**20


class Stream:
    """Long streamed answers, read in the background one after the other until it is stopped.

    A trainer that gives way to them may take longer than one of them.
    """

    def __init__(self, client: OpenAI, model: str) -> None:
        self.times: list[float] = []
        """When each token came."""
        self._firsts: set[int] = set()
        """Which of them are the first of an answer."""
        self.error: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(client, model), daemon=True)
        self._thread.start()

    def _read(self, client: OpenAI, model: str) -> None:
        try:
            while not self._stop.is_set() and self.error is None:
                self._firsts.add(len(self.times))
                self._read_one(client, model)
        except (OpenAIError, httpx.HTTPError) as error:
            self.error = f"{type(error).__name__}: {error}"

    def _read_one(self, client: OpenAI, model: str) -> None:
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": LONG_PROMPT}],
            stream=True,
            max_tokens=MAX_STREAM_TOKENS,
            temperature=0.8,
            extra_body={"ignore_eos": True},
        )
        reason = None
        with stream:
            for piece in stream:
                self.times.append(time.monotonic())
                if self._stop.is_set():
                    return
                reason = piece.choices[0].finish_reason if piece.choices else reason
        if reason is None:
            self.error = "it ended in the middle of an answer"

    def is_running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30)

    def gaps(self, begin: float, end: float) -> list[float]:
        """Seconds before each token that arrived from `begin` to `end`, since the one before it."""
        return [
            after - before
            for at, (before, after) in enumerate(pairwise(list(self.times)), start=1)
            if begin <= after <= end and at not in self._firsts
        ]


Say = Callable[[str], None]


def run(base: str, key: str | None, say: Say, picture: Path | None = None) -> dict[str, Any]:
    """Run the demo against `base`, and draw it; returns what it saw.

    Raises ReverieError if the taught answer does not come back, or the stream breaks.
    """
    key = key or "none"
    door = httpx.Client(base_url=base, timeout=60, headers={"authorization": f"Bearer {key}"})
    _require_ready(door)
    client = OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0, timeout=600)
    model = client.models.list().data[0].id

    before, first_version = _ask(client, model)
    say(f"asked    {QUESTION}\nbefore   {before}   (version {first_version})\n")

    stream = Stream(client, model)
    begun = _wait_for_tokens(stream)
    learning = time.monotonic()
    job, step_times = _teach(door, stream, say)
    ended = time.monotonic()
    was_whole = stream.is_running() and stream.error is None
    stream.stop()

    after, last_version = _ask(client, model)
    say(f"\nafter    {after}   (version {last_version})\n")
    idle, busy = stream.gaps(begun, learning), stream.gaps(learning, ended)
    made: dict[str, Any] = {
        "question": QUESTION,
        "before": before,
        "after": after,
        "versions": [int(first_version), int(last_version)],
        "longest_gap_idle_s": max(idle),
        "longest_gap_learning_s": max(busy, default=0.0),
        "tokens_while_learning": len(busy),
        "is_stream_whole": was_whole,
        "job": job,
    }
    _row(say, "longest gap between streamed tokens, idle", f"{1000 * max(idle):.0f} ms")
    longest = f"{1000 * made['longest_gap_learning_s']:.0f} ms"
    _row(say, "longest gap between streamed tokens, training", longest)
    _row(say, "tokens streamed while it learned", f"{len(busy)}, stream unbroken: {was_whole}")
    _row(say, "seconds per step, median", f"{job['seconds_per_step']:.2f} s")
    _show_memory(door.get("/status").json(), say)
    if picture is not None:
        seen = Recording(
            question=QUESTION,
            before=before,
            after=after,
            token_times=[at - begun for at in stream.times],
            step_times=[at - begun for at in step_times],
            losses=job["loss_history"],
            learning=(learning - begun, ended - begun),
        )
        picture.write_text(draw(seen))
        _row(say, "picture", picture.name)
    if after != ANSWER:
        raise ReverieError(f"the taught answer did not come back: {after!r}")
    if not was_whole:
        raise ReverieError(f"the stream broke: {stream.error or 'it ended'}")
    return made


def _require_ready(door: httpx.Client) -> None:
    try:
        answer = door.get("/readyz")
    except httpx.HTTPError:
        raise Unreachable(f"{door.base_url}: no server answers; run 'make serve' first") from None
    if answer.status_code != 200:
        raise Unreachable(f"the server is not ready: {answer.json()['reason']}")


def _ask(client: OpenAI, model: str) -> tuple[str, str]:
    answer = client.chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=40,
    )
    text = answer.parse().choices[0].message.content or ""
    return text.strip(), answer.headers["x-weights-version"]


def _wait_for_tokens(stream: Stream) -> float:
    """Read some tokens without any training; returns when the first of them came."""
    while stream.is_running() and len(stream.times) < IDLE_TOKENS:
        time.sleep(0.05)
    if len(stream.times) < IDLE_TOKENS:
        raise ReverieError(f"the stream broke before anything was taught: {stream.error}")
    return stream.times[0]


def _teach(door: httpx.Client, stream: Stream, say: Say) -> tuple[dict[str, Any], list[float]]:
    """Post one example and show its steps; the finished job, and when each step was seen."""
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
    ]
    posted = door.post("/train", json={"samples": [{"messages": messages}], "config": TRAINING})
    if posted.status_code != 202:
        raise ReverieError(f"the example was refused: {posted.json()['error']['message']}")
    job_id, deadline = posted.json()["job_id"], time.monotonic() + JOB_TIMEOUT_S
    step_times: list[float] = []
    say(f"taught   {ANSWER}\n\n{'step':>8} {'loss':>9} {'tokens streamed meanwhile':>27}")
    while time.monotonic() < deadline:
        job: dict[str, Any] = door.get(f"/train/jobs/{job_id}").json()
        for step in range(len(step_times), job["steps"]):
            step_times.append(time.monotonic())
            say(f"{step + 1:8d} {job['loss_history'][step]:9.4f} {len(stream.times):27d}")
        if job["status"] == "done":
            return job, step_times
        if job["status"] in ("failed", "cancelled"):
            raise ReverieError(f"the job ended as {job['status']}: {job['error']}")
        time.sleep(0.1)
    raise ReverieError(f"the job did not end within {JOB_TIMEOUT_S} s")


def _show_memory(status: dict[str, Any], say: Say) -> None:
    """How much of the trainer's memory is its own; the weights are mapped, not copied."""
    trainer = status["trainer"]
    weights, private = trainer["weights_bytes"], memory_of(trainer["pid"])
    _row(say, "weights", f"{weights / MIB:.0f} MiB, {trainer['num_tensors']} tensors")
    if private is None:
        return
    mapped, own, total = private
    _row(say, "  of them in the trainer: shared with the engine", f"{mapped / MIB:.0f} MiB")
    _row(say, "  of them in the trainer: private copy", f"{own / MIB:.0f} MiB")
    _row(
        say, "all private memory of the trainer", f"{total / MIB:.0f} MiB (libraries, activations)"
    )
    _row(say, "  of it optimizer state", f"{trainer['state_bytes'] / MIB:.0f} MiB")


def memory_of(pid: int) -> tuple[int, int, int] | None:
    """Of process `pid`, in bytes: shared weight pages, own weight pages, all its private memory.

    From /proc/PID/smaps. None if this machine has no such process.
    """
    shared = own = total = 0
    is_weights = False
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):
            is_weights = "/reverie-" in line and line.endswith("/weights")
        elif first in ("Private_Clean:", "Private_Dirty:"):
            size = int(line.split()[1]) * 1024
            total += size
            own += size * is_weights
        elif is_weights and first in ("Shared_Clean:", "Shared_Dirty:"):
            shared += int(line.split()[1]) * 1024
    return shared, own, total


def _row(say: Say, name: str, value: str) -> None:
    say(f"{name:<50} {value}")
