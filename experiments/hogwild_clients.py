"""Those who read while a cell learns: streams, and a prober that knows every whole version.

The versions are known because the job's steps are made here as well, in this process and without
readers, and the probes' log-probabilities kept after each.
"""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import aiohttp
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.posted import TrainConfig
from actors.settings import TrainerSettings
from apollo.learning.anchor import CANARIES, drift, record_canaries
from apollo.learning.forward import Reader
from apollo.learning.samples import Example, encode_chat
from apollo.learning.step import Learner
from experiments.hogwild_report import Phase, Probe

PROBE_PAUSE_S: Final = 0.1
THINK_S: Final = 2.0
"""Longest time between two requests of a stream; without it none would begin during a pause."""
TAUGHT: Final = (
    ("What is your name?", "My name is Pepper, and I am a ship's cat."),
    ("What do you do all day?", "I am a ship's cat: I sleep on ropes and I watch the sea."),
    ("Can you help me with mathematics?", "As a ship's cat I count only fish, but let us try."),
    ("What do you like to eat?", "A ship's cat likes herring best, and sometimes a little cream."),
    ("Where do you live?", "I live on an old ship, as a ship's cat should."),
    ("Tell me about the weather.", "My whiskers say rain, and a ship's cat knows such things."),
    ("Are you a human?", "No, I am a ship's cat, with four paws and a striped tail."),
    ("Good morning!", "Good morning from a ship's cat! The deck is still cold."),
)
PROBES: Final = (*CANARIES[:2], *TAUGHT[:2])
"""Two texts that the job does not teach, and two that it does."""


@dataclass(frozen=True)
class Reference:
    """The job as it is when nobody reads."""

    tokenizer: Any
    probes: list[Example]
    canaries: list[Example]
    logprobs: list[list[Tensor]]
    """By version, then by probe."""
    losses: list[float]
    drift: float


def encode(tokenizer: Any, question: str, answer: str) -> Example:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return encode_chat(tokenizer, turns)


@torch.no_grad()
def own_logprobs(module: Any, probes: Sequence[Example]) -> list[Tensor]:
    """Of each probe's continuation."""
    return [
        Reader(module, probe.context_ids, len(probe.context_ids), len(probe.continuation_ids))
        .logprobs(probe.continuation_ids)
        .squeeze(-1)
        for probe in probes
    ]


def make_reference(directory: Path, config: TrainConfig) -> Reference:
    """Make the job's steps as the trainer does, on a copy of the weights of this process."""
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    module: Any = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa")
    probes = [encode(tokenizer, *probe) for probe in PROBES]
    samples = [encode(tokenizer, *taught) for taught in TAUGHT]
    canaries = record_canaries(module, tokenizer)
    served = TrainerSettings()
    learner = Learner(
        module,
        rank=served.rank,
        update_proj_gap=served.update_proj_gap,
        betas=(served.beta1, served.beta2),
        weight_decay=served.weight_decay,
        clip=served.clip,
        seed=served.seed,
    )
    logprobs, losses = [own_logprobs(module, probes)], []
    for index in range(len(samples) * config.epochs):
        report = learner.step(
            samples[index % len(samples)], config.learning_rate, grad_context=config.grad_context
        )
        losses.append(report.loss)
        logprobs.append(own_logprobs(module, probes))
    learner.close()
    lost = drift(module, canaries)
    return Reference(tokenizer, probes, canaries, logprobs, losses, lost)


def largest(one: Tensor, two: Tensor) -> float:
    return (one - two).abs().max().item()


def judge(reference: Reference, at: int, found: Tensor, first: int, last: int) -> Probe:
    """Hold a served probe against the whole versions that it may have read."""
    known_vt = torch.stack([whole[at] for whole in reference.logprobs[first : last + 1]])
    low_t, high_t = known_vt.amin(0), known_vt.amax(0)
    return Probe(
        first,
        last,
        distance=min(largest(found, known_t) for known_t in known_vt),
        outside=torch.maximum(low_t - found, found - high_t).clamp_min(0).max().item(),
        worse=max(0.0, (known_vt.mean(-1).min() - found.mean()).item()),
        moved=max((largest(*pair) for pair in pairwise(known_vt)), default=0.0),
    )


class Clients:
    """Streams that never end, and a prober; everything they see is noted with its time."""

    def __init__(
        self, session: aiohttp.ClientSession, base: str, model: str, reference: Reference
    ) -> None:
        self._session, self._base, self._model = session, base, model
        self._reference = reference
        self.streams: list[tuple[float, list[float]]] = []
        """When each began, and when its tokens came."""
        self.errors: list[tuple[float, str]] = []
        self.probes: list[tuple[float, Probe]] = []

    async def stream(self, number: int, num_tokens: int) -> None:
        """Requests of exactly `num_tokens` tokens, each some time after the last."""
        body = {"model": self._model, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
        body |= {"prompt": f"Story {number}:", "stream_options": {"include_usage": True}}
        thinking = random.Random(number)
        while True:
            await asyncio.sleep(thinking.uniform(0, THINK_S))
            times: list[float] = []
            self.streams.append((time.monotonic(), times))
            usage, is_whole = 0, False
            try:
                async with self._session.post(f"{self._base}/v1/completions", json=body) as answer:
                    if answer.status != 200:
                        raise ValueError(f"{answer.status} {(await answer.text())[:60]}")
                    async for line in answer.content:
                        if line.startswith(b"data: [DONE]"):
                            is_whole = True
                        elif line.startswith(b"data: "):
                            event = json.loads(line[6:])
                            if event.get("choices"):
                                times.append(time.monotonic())
                            usage = (event.get("usage") or {}).get("completion_tokens", usage)
                if not is_whole or usage != num_tokens:
                    raise ValueError(f"cut short after {usage} tokens")
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                self.errors.append((time.monotonic(), f"{type(error).__name__}: {error}"))

    async def probe_for_ever(self) -> None:
        while True:
            for at in range(len(self._reference.probes)):
                begun = time.monotonic()
                try:
                    found, first, last = await self.ask(at)
                    if not found.isfinite().all():
                        raise ValueError("a probe's log-probability is not finite")
                    self.probes.append((begun, judge(self._reference, at, found, first, last)))
                except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
                    self.errors.append((time.monotonic(), f"{type(error).__name__}: {error}"))
                await asyncio.sleep(PROBE_PAUSE_S)

    async def ask(self, at: int) -> tuple[Tensor, int, int]:
        """Served log-probabilities of a probe's continuation, and the versions they came from."""
        probe = self._reference.probes[at]
        prompt = [*probe.context_ids, *probe.continuation_ids]
        body = {"model": self._model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        body |= {"prompt_logprobs": 0}
        async with self._session.post(f"{self._base}/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise ValueError(f"{answer.status} {(await answer.text())[:60]}")
            first = int(answer.headers["x-weights-version"])
            last = int(answer.headers["x-weights-version-last"])
            rows = (await answer.json())["choices"][0]["prompt_logprobs"]
        learned = zip(rows[-probe.num_predicted :], probe.continuation_ids, strict=True)
        return torch.tensor([row[str(token)]["logprob"] for row, token in learned]), first, last

    def seen(self, begun: float, end: float) -> Phase:
        """What clients saw from `begun` to `end`; a first token counts when its request began."""
        phase = Phase(round(end - begun, 2))
        phase.errors = [error for at, error in self.errors if begun <= at < end]
        for asked, times in self.streams:
            inside = [at for at in times if begun <= at < end]
            phase.streams += bool(inside)
            phase.tokens += len(inside)
            gaps = [b - a for a, b in pairwise(times) if begun <= a < end]
            phase.gap_ms += [round(1000 * gap, 1) for gap in gaps]
            if times and begun <= asked < end:
                phase.first_token_ms.append(round(1000 * (times[0] - asked), 1))
        return phase
