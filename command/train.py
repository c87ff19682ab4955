"""`reverie train FILE`: samples from a file, posted in parts, followed until they are learned."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from actors.errors import ReverieError, SettingsError
from command import samples
from command.client import Refused, Server
from command.jobs import ENDED, require_done, summary, until_ended
from command.options import DEFAULT_PORT, Json, Port, number_or_word, pairs_of
from command.output import Output
from command.samples import Line

QUEUE_LOOK_S: Final = 2.0
MAX_QUEUE_WAIT_S: Final = 24 * 3600


def train(
    file: Annotated[Path, typer.Argument(help="Samples or conversations, as JSON lines; - reads.")],
    epochs: Annotated[int | None, typer.Option(help="Passes over the samples.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any of a job's settings, as key=value.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the end.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only look at the file.")] = False,
    port: Port = DEFAULT_PORT,
    is_json: Json = False,
) -> None:
    """Teach a running cell what a file holds, and show the loss; a wrong line posts nothing.

    Over 256 samples become several jobs, learned one after another, each in its own epochs. Ctrl-C
    ends the showing, not the learning.
    """
    output = Output(is_json)
    config = config_of(epochs, lr, set_)
    found = samples.read(file, _read(file))
    if check:
        output.show({"samples": len(found)}, f"{len(found)} samples, all of them well-formed")
        return
    ended, kept = _teach(Server(port), found, config, output, detach)
    num_known = len(found) - kept
    told = [f"[bold]{job['job_id']}[/]  {summary(job)}" for job in ended]
    if num_known:
        told.append(f"{num_known} of {len(found)} were known by their id and are not learned twice")
    output.show({"jobs": ended, "num_known": num_known}, *told)
    if not detach:
        for job in ended:
            require_done(job)


def config_of(epochs: int | None, lr: float | None, set_: list[str] | None) -> dict[str, Any]:
    """A job's settings; raises SettingsError that names the key."""
    from actors.posted import TrainConfig
    from door.limits import parse

    config = {key: number_or_word(value) for key, value in pairs_of(set_, "key=value").items()}
    for name, key, value in (("--epochs", "epochs", epochs), ("--lr", "learning_rate", lr)):
        if value is not None and config.setdefault(key, value) != value:
            raise SettingsError(f"{name} and --set {key}: say it once").about(key)
    try:
        parse(TrainConfig, json.dumps(config).encode())
    except ReverieError as error:
        known = ", ".join(TrainConfig.model_fields)
        raise SettingsError(f"{error}; a job's settings are {known}").about(
            error.param or "config"
        ) from None
    return config


def _read(file: Path) -> bytes:
    try:
        if str(file) == "-":
            return sys.stdin.buffer.read(samples.MAX_FILE_BYTES + 1)
        with file.open("rb") as opened:
            return opened.read(samples.MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}; name a file of JSON lines, or -") from None


def _teach(
    server: Server, found: list[Line], config: dict[str, Any], output: Output, detach: bool
) -> tuple[list[dict[str, Any]], int]:
    """The jobs at their end (as they were posted, if detached), and how many samples are new."""
    from actors.settings import LimitSettings

    limits = LimitSettings()
    jobs: list[dict[str, Any]] = []
    num_new = 0
    with output.steps() as progress:
        for part in samples.parts(found, limits.max_samples, limits.max_body_bytes // 2):
            accepted = _post(server, part, config, jobs)
            num_new += int(accepted["training_samples"])
            if accepted["training_samples"]:
                jobs.append(server.get(f"/train/jobs/{accepted['job_id']}"))
        if not detach:
            jobs = [until_ended(server, job["job_id"], progress) for job in jobs]
    return jobs, num_new


def _post(
    server: Server, part: list[Line], config: dict[str, Any], jobs: list[dict[str, Any]]
) -> dict[str, Any]:
    """Post a part; while the queue is full of what was posted before it, wait for room."""
    body = {"samples": [line.sample for line in part], "config": config}
    deadline = time.monotonic() + MAX_QUEUE_WAIT_S
    while True:
        try:
            accepted: dict[str, Any] = server.post("/train", body)
            return accepted
        except Refused as error:
            is_full = error.code == 429 and jobs and time.monotonic() < deadline
            if not is_full or _have_ended(server, jobs):
                raise _located(error, part) from None
        time.sleep(QUEUE_LOOK_S)


def _have_ended(server: Server, jobs: list[dict[str, Any]]) -> bool:
    states = [server.get(f"/train/jobs/{job['job_id']}")["status"] for job in jobs]
    return all(state in ENDED for state in states)


def _located(error: Refused, part: list[Line]) -> Refused:
    """What the server says of `samples[3]`, said of a line of the file."""
    number, _, rest = (error.param or "").removeprefix("samples[").partition("]")
    if not (error.param or "").startswith("samples[") or not number.isdigit():
        return error
    line = part[int(number)].number
    told = str(error).replace(f"samples[{number}]", f"line {line}", 1)
    return Refused(told, error.code, error.told).about(f"line {line}{rest}")
