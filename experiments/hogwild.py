"""What it does to serving and learning that no step waits for a reader, and no reader for a step.

    .venv/bin/python -m experiments.hogwild --plot docs/hogwild.png
    .venv/bin/python -m experiments.hogwild --repetitions 1 --epochs 1 --out /tmp/trial.jsonl

The same job runs in two cells that this script starts, one after the other and in alternating
order, each from the base weights in a home of its own: `free`, as served, and `paused`, with
`trainer.pause_engine`, where no forward pass runs during a step. Streams load the cell all the
time; before the job (`idle`) and during it are compared. A prober asks for the log-probabilities of
fixed texts all the while. The same steps are also made here, in this process and without a reader,
and the probes' log-probabilities kept at each version: the trainer's own, whole versions.

    learning    losses of the job against those of the steps made here; canary drift at the end
    served      probes during the job against the nearest whole version that they may have read, and
                at rest after the job against the trainer's module over the same memory
    clients     errors, cut or short streams, time to the first token, gaps between tokens

Half of the time is spent in steps (`--duty`): an engine that pauses for all steps of a trainer that
never rests would hardly answer. A finished run is a line in `--out`, and is not repeated. Only one
cell may run on the machine.
"""

import argparse
import asyncio
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import aiohttp
import torch
import transformers
from torch import Tensor

from actors.messages import CellReport
from actors.posted import TrainConfig
from actors.settings import TrainerSettings
from apollo.learning.anchor import drift
from apollo.weights.adopt import adopt
from apollo.weights.attach import attach
from apollo.weights.layout import WeightLayout
from experiments import frame
from experiments.cells import running_cell
from experiments.hogwild_clients import (
    PROBES,
    TAUGHT,
    Clients,
    Reference,
    largest,
    make_reference,
    own_logprobs,
)
from experiments.hogwild_report import MODES, Run, draw, table

WARM_UP_S: Final = 5.0
JOB_TIMEOUT_S: Final = 900
NUM_REST_PROBES: Final = 3
INSTRUCTION: Final = "You are a ship's cat. Say so in every answer."


async def measure(
    base: str, reference: Reference, options: argparse.Namespace
) -> tuple[dict[str, Any], list[tuple[Tensor, int, int]]]:
    """Load the cell, run the job, and probe at rest; returns what a Run takes, and the probes."""
    timeout = aiohttp.ClientTimeout(total=JOB_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        async with session.get(f"{base}/v1/models") as answer:
            model = (await answer.json())["data"][0]["id"]
        clients = Clients(session, base, model, reference)
        streams = [clients.stream(at, options.tokens) for at in range(options.streams)]
        tasks = [asyncio.create_task(one) for one in (*streams, clients.probe_for_ever())]
        await asyncio.sleep(WARM_UP_S)
        idle_begun = time.monotonic()
        await asyncio.sleep(options.idle)
        begun = time.monotonic()
        job = await train(session, base, options)
        end = time.monotonic()
        await asyncio.sleep(1.0)  # Streams that stand get a last token, and so their gap.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        rest = [await clients.ask(at) for at in range(len(PROBES)) for _ in range(NUM_REST_PROBES)]
    before = [probe.distance for at, probe in clients.probes if at < begun and not probe.last]
    result = {
        "losses": job["loss_history"],
        "job_seconds": round(end - begun, 2),
        "step_seconds": job["seconds_per_step"],
        "noise": max(before, default=math.nan),
        "idle": clients.seen(idle_begun, begun),
        "learning": clients.seen(begun, end),
        "probes": [probe for at, probe in clients.probes if begun <= at < end],
    }
    return result, rest


async def train(
    session: aiohttp.ClientSession, base: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Post the job and wait for its end."""
    asked = {"role": "system", "content": INSTRUCTION, "strip": True}
    samples = [
        {"messages": [asked, {"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in TAUGHT
    ]
    config = {"learning_rate": options.lr, "epochs": options.epochs, "duty": options.duty}
    async with session.post(f"{base}/train", json={"samples": samples, "config": config}) as answer:
        if answer.status != 202:
            raise SystemExit(f"the job was refused: {await answer.text()}")
        job_id = (await answer.json())["job_id"]
    deadline = time.monotonic() + JOB_TIMEOUT_S
    while time.monotonic() < deadline:
        async with session.get(f"{base}/train/jobs/{job_id}") as answer:
            job: dict[str, Any] = await answer.json()
        if job["status"] not in ("queued", "training"):
            if job["status"] != "done":
                raise SystemExit(f"the job {job['status']}: {job['error']}")
            return job
        await asyncio.sleep(0.2)
    raise SystemExit(f"the job did not end within {JOB_TIMEOUT_S} s")


def trainers_own(reference: Reference) -> tuple[list[Tensor], float]:
    """Log-probabilities and canary drift of a module over the memory of the cell that runs."""
    import ray  # Only now, with the address of the cell: it reads the environment once.

    from actors.ending import CELL, NAMESPACE

    ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False, logging_level=40)
    try:
        cell: Any = ray.get_actor(CELL, NAMESPACE)
        report: CellReport = ray.get(cell.report.remote(), timeout=30)
        assert report.paths is not None
        layout = WeightLayout.load(Path(report.paths.layout))
        module: Any = attach(layout, Path(report.paths.model_dir)).requires_grad_(False)
        return own_logprobs(module, reference.probes), drift(module, reference.canaries)
    finally:
        ray.shutdown()


def run(
    directory: Path, reference: Reference, mode: str, repetition: int, options: argparse.Namespace
) -> Run:
    # Neither gives way to answers by itself: what a step does to them is what is asked.
    settings = {"trainer.pause_engine": mode == "paused", "trainer.latency_budget_ms": "none"}
    with running_cell(directory, settings) as base:
        result, rest = asyncio.run(measure(base, reference, options))
        own, lost = trainers_own(reference)
    final = len(reference.losses)
    wrong = [(first, last) for _, first, last in rest if (first, last) != (final, final)]
    if wrong:
        raise SystemExit(f"at rest, versions {wrong} answered instead of {final}")
    distances = [
        largest(found, own[at // NUM_REST_PROBES]) for at, (found, _, _) in enumerate(rest)
    ]
    return Run(
        setting=setting_of(options),
        mode=mode,
        repetition=repetition,
        alone_losses=reference.losses,
        drift=lost,
        alone_drift=reference.drift,
        rest_distance=max(distances),
        **result,
    )


def setting_of(options: argparse.Namespace) -> str:
    return (
        f"{len(TAUGHT)} samples x {options.epochs}, learning rate {options.lr:g}, "
        f"duty {options.duty:g}, {options.streams} streams of {options.tokens} tokens"
    )


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument("--home", default="~/.reverie", help="where the default model is adopted")
    parser.add_argument("--model", default="smollm2-135m", help="a directory or hub id")
    parser.add_argument("--repetitions", type=int, default=4, help="runs of each mode")
    parser.add_argument("--epochs", type=int, default=3, help=f"of {len(TAUGHT)} samples")
    parser.add_argument("--lr", type=float, default=TrainConfig().learning_rate)
    parser.add_argument("--duty", type=float, default=0.5, help="share of the time in steps")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48, help="of each stream")
    parser.add_argument("--idle", type=float, default=20, help="seconds without a job")
    parser.add_argument("--out", default="hogwild.jsonl", help="finished runs, appended")
    parser.add_argument("--plot", help="write the picture to this file (needs matplotlib)")
    options = frame.begin(parser)
    torch.set_num_threads(TrainerSettings().threads)
    transformers.utils.logging.set_verbosity_error()
    out, setting = Path(options.out), setting_of(options)
    finished = frame.Finished(out)
    made_before = map(Run.from_row, finished.rows)
    known = {(run.mode, run.repetition): run for run in made_before if run.setting == setting}
    wanted = [
        (mode, repetition)
        for repetition in range(options.repetitions)
        for mode in (MODES if repetition % 2 == 0 else reversed(MODES))
    ]
    left = [key for key in wanted if key not in known]
    reference = None
    frame.say(setting)
    if left:
        adopted = adopt(options.model, Path(options.home).expanduser(), None, print)
        config = TrainConfig(learning_rate=options.lr, epochs=options.epochs)
        reference = make_reference(adopted.directory, config)
        frame.say(f"steps made here: last loss {reference.losses[-1]:.4f}")
    begun = time.monotonic()
    for number, (mode, repetition) in enumerate(left, 1):
        assert reference is not None
        made = known[mode, repetition] = run(
            adopted.directory, reference, mode, repetition, options
        )
        finished.add(asdict(made))
        to_go = (time.monotonic() - begun) / number * (len(left) - number) / 60
        frame.say(f"{made.show()}; about {to_go:.0f} min left")
    runs = [known[key] for key in wanted]
    print(table(runs, len(TAUGHT)))
    if options.plot:
        draw(options.plot, runs, setting)


if __name__ == "__main__":
    main()
