"""One copy of the weights, shown from outside: what the engine reads is what the trainer writes.

    .venv/bin/python -m experiments.gpu.zero_copy --model DIRECTORY --json zero_copy.json    # 5 min

A cell over the model, asked as any client asks it, on a GPU with CUDA graphs and compilation on
(`--eager` turns them off; on a CPU they always are). For each line of the table, what must hold:

    tensors         the trainer has every tensor of the checkpoint
    reading         a sample's loss in the trainer is vLLM's own log-probability of it, before and
                    after the weights have been written, of the same version
    writing         tokens that were decoded one by one (where a CUDA graph is replayed) are as
                    likely when they are read at once: a graph that kept old weights would differ
    learning        20 steps change the greedy answer
    memory          what a GPU has free again when the trainer ends is less than the weights, which
                    are not its own (for models of more bytes than CUDA takes for a process)
    trainer killed  answers go on meanwhile, each to its last token, and a new one learns
    engine killed   /readyz says so within 2 s, and 200 again later

Ends with an error if a line does not hold.
"""

import json
import os
import signal
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import httpx
import psutil

from actors.settings import DEFAULT_MODEL
from apollo.weights.adopt import adopt
from apollo.weights.model_directory import weight_files
from experiments import frame
from experiments.cells import running_cell
from experiments.kill_nine import outcome, victim_pid

NUM_STEPS: Final = 20
RATE: Final = 5e-4
"""Large, so that twenty steps are enough on weights of noise, too."""
STILL: Final = 1e-12
"""A step of it changes nothing: its loss is that of the weights before and after."""
NUM_TOKENS: Final = 32
TOLERANCE: Final = {"cpu": 1e-3, "cuda": 3e-2}
"""Nats per token: float32 there, bfloat16 here, where the same sums come out in another order."""
NOTICE_S: Final = 2.0
TIMEOUT_S: Final = 120.0
READY_TIMEOUT_S: Final = 400.0
PROMPT: Final = "Once upon a time there was a lighthouse keeper who"
LEARNED: Final = (
    " never slept, because the sea was loud and the lamp was old and the night was long."
)


@dataclass
class Line:
    """One claim."""

    name: str
    holds: bool
    seen: str
    numbers: dict[str, float] = field(default_factory=dict)


class Cell:
    """The server, over HTTP."""

    def __init__(self, base: str, device: str) -> None:
        self.device = device
        self.http = httpx.Client(base_url=base, timeout=TIMEOUT_S)
        self.model: str = self.ask("GET", "/v1/models")["data"][0]["id"]

    def ask(self, method: str, route: str, body: dict[str, Any] | None = None) -> Any:
        answer = self.http.request(method, route, json=body)
        if answer.is_error:
            raise SystemExit(f"{method} {route}: {answer.text}")
        return answer.json()

    def status(self) -> Any:
        return self.ask("GET", "/status")

    def tokens(self, text: str) -> list[int]:
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        return list(self.ask("POST", "/tokenize", body)["tokens"])

    def complete(self, prompt: Sequence[int], **more: Any) -> Any:
        body = {"model": self.model, "prompt": list(prompt), "temperature": 0, **more}
        return self.ask("POST", "/v1/completions", body)["choices"][0]

    def decode(self, prompt: Sequence[int]) -> tuple[list[int], list[float]]:
        """A greedy answer, token by token, and the log-probability of each."""
        more = {"logprobs": 0, "return_tokens_as_token_ids": True, "ignore_eos": True}
        found = self.complete(prompt, max_tokens=NUM_TOKENS, **more)["logprobs"]
        ids = [int(token.removeprefix("token_id:")) for token in found["tokens"]]
        return ids, found["token_logprobs"]

    def read(self, prompt: Sequence[int], learned: Sequence[int]) -> list[float]:
        """The log-probability of each token after the prompt, all read at once."""
        rows = self.complete([*prompt, *learned], max_tokens=1, prompt_logprobs=0)
        last = rows["prompt_logprobs"][-len(learned) :]
        return [row[str(token)]["logprob"] for row, token in zip(last, learned, strict=True)]

    def train(self, prompt: Sequence[int], learned: Sequence[int], rate: float, steps: int) -> Any:
        sample = {"context_ids": list(prompt), "continuation_ids": list(learned)}
        config = {"learning_rate": rate, "epochs": steps}
        job = self.ask("POST", "/train", {"samples": [sample], "config": config})["job_id"]
        deadline = time.monotonic() + READY_TIMEOUT_S
        while (seen := self.ask("GET", f"/train/jobs/{job}"))["status"] != "done":
            if seen["status"] in ("failed", "cancelled") or time.monotonic() > deadline:
                raise SystemExit(f"the job is {seen['status']}: {seen['error']}")
            time.sleep(0.2)
        return seen

    def is_ready(self) -> bool:
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.HTTPError:
            return False


def checkpoint_tensors(directory: Path) -> int:
    """How many the files hold; a tied one is stored once."""
    count = 0
    for path in weight_files(directory):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            count += len(json.loads(file.read(size)).keys() - {"__metadata__"})
    return count


def tensors(cell: Cell, directory: Path) -> Line:
    has, there = cell.status()["trainer"]["num_tensors"], checkpoint_tensors(directory)
    return Line("tensors", has == there, f"{has} of {there}")


def reading(cell: Cell, when: str, prompt: Sequence[int], learned: Sequence[int]) -> Line:
    """The trainer's loss against vLLM's log-probabilities, at one version."""
    engine = -fmean(cell.read(prompt, learned))
    (loss,) = cell.train(prompt, learned, STILL, 1)["loss_history"]
    apart = abs(loss - engine)
    seen = f"loss {loss:.4f}, vLLM {engine:.4f}: {apart:.1e} nats per token apart"
    return Line(f"reading, {when}", apart <= TOLERANCE[cell.device], seen, {"apart": apart})


def writing(cell: Cell, prompt: Sequence[int]) -> Line:
    """Decoding against reading, of the answer as it is now."""
    ids, decoded = cell.decode(prompt)
    apart = abs(fmean(decoded) - fmean(cell.read(prompt, ids)))
    seen = f"{len(ids)} tokens, {apart:.1e} nats per token apart"
    return Line("writing", apart <= TOLERANCE[cell.device], seen, {"apart": apart})


def used_bytes() -> int:
    """Of the GPU, by everybody."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free


def trainer_killed(cell: Cell, prompt: Sequence[int]) -> list[Line]:
    """Kill it while a stream runs; what ended with it, and what went on."""
    before = cell.status()["trainer"]
    process, lines = psutil.Process(before["pid"]), []
    held = used_bytes() if cell.device == "cuda" else None
    body = {"model": cell.model, "prompt": list(prompt), "stream": True, "ignore_eos": True}
    parts: list[bytes] = []
    with cell.http.stream("POST", "/v1/completions", json=body | {"max_tokens": 64}) as answer:
        for part in answer.iter_bytes():
            if not parts:
                process.kill()
                begun = time.monotonic()
            parts.append(part)
        said = outcome(answer, b"".join(parts))
    psutil.wait_procs([process], timeout=10)
    if held is not None:
        own, weights = held - used_bytes(), before["weights_bytes"]
        seen = f"{own / 1e9:.2f} GB ended with the trainer, the weights are {weights / 1e9:.2f} GB"
        lines.append(Line("memory", 0 < own < weights, seen, {"own_bytes": own}))
    wait(lambda: is_back(cell, process.pid))
    back = time.monotonic() - begun
    history = cell.train(prompt, cell.tokens(LEARNED), STILL, 1)["loss_history"]
    seen = f"the stream {said}; a new one after {back:.1f} s, which learns"
    lines.append(Line("trainer killed", said == "200" and len(history) == 1, seen, {"s": back}))
    return lines


def is_back(cell: Cell, killed: int) -> bool:
    trainer = cell.status()["trainer"] if cell.is_ready() else None
    return trainer is not None and trainer["pid"] != killed


def engine_killed(cell: Cell) -> Line:
    """Kill vLLM's engine process."""
    pid = victim_pid(cell.status(), "engine")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    begun = time.monotonic()
    wait(lambda: not cell.is_ready())
    noticed = time.monotonic() - begun
    wait(cell.is_ready)
    back = time.monotonic() - begun
    seen = f"noticed after {noticed:.2f} s, ready after {back:.1f} s"
    return Line("engine killed", noticed <= NOTICE_S, seen, {"noticed": noticed, "back": back})


def wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not until():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {READY_TIMEOUT_S:.0f} s")
        time.sleep(0.05)


def look(cell: Cell, directory: Path) -> list[Line]:
    """Every line of the table, in its order."""
    prompt, learned = cell.tokens(PROMPT), cell.tokens(LEARNED)
    lines = [tensors(cell, directory), reading(cell, "at first", prompt, learned)]
    said, _ = cell.decode(prompt)
    job = cell.train(prompt, learned, RATE, NUM_STEPS)
    now, _ = cell.decode(prompt)
    losses = job["loss_history"]
    seen = f"{NUM_STEPS} steps, loss {losses[0]:.2f} to {losses[-1]:.2f}"
    lines.append(Line("learning", now != said and losses[-1] < losses[0], seen))
    lines += [reading(cell, "after them", prompt, learned), writing(cell, prompt)]
    lines += trainer_killed(cell, prompt)
    lines.append(engine_killed(cell))
    return lines


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a directory or hub id")
    parser.add_argument("--home", default="~/.reverie", help="where the model is adopted")
    parser.add_argument("--eager", action="store_true", help="no compilation and CUDA graphs")
    parser.add_argument("--json", type=Path, help="write the lines here")
    options = frame.begin(parser)
    directory = adopt(options.model, Path(options.home).expanduser(), None, frame.say).directory
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {"engine.enforce_eager": options.eager or device == "cpu"}
    with running_cell(directory, settings) as base:
        frame.say("ready")
        lines = look(Cell(base, device), directory)
    print("| what | holds | seen |\n|---|---|---|")
    for line in lines:
        print(f"| {line.name} | {'yes' if line.holds else '**no**'} | {line.seen} |")
    found = {"lines": [vars(line) for line in lines]}
    frame.keep(options.json, options, found)
    if not all(line.holds for line in lines):
        raise SystemExit("not every line holds")


if __name__ == "__main__":
    main()
