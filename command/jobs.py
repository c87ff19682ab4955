"""`reverie jobs`: what is being learned, and following one of them until it ends."""

import time
from typing import Annotated, Any, Final

import typer
from rich.progress import Progress

from actors.errors import ReverieError
from command.client import Refused, Server, Unreachable
from command.options import DEFAULT_PORT, Json, Port
from command.output import Output, loss_of, plain, table, when

LOOK_INTERVAL_S: Final = 0.3
MAX_SILENCE_S: Final = 300
"""A cell that restarts answers again within a minute or so; after this it is given up."""
ENDED: Final = ("done", "failed", "cancelled")
COLOURS: Final = {"done": "green", "failed": "red", "training": "cyan", "cancelled": "yellow"}
TICKS: Final = " .:-=+*#"

jobs = typer.Typer(help="Training jobs: list, show, follow, cancel.")


def known_jobs(incomplete: str) -> list[str]:
    """For completion: those of a running cell, or none."""
    try:
        found = Server(DEFAULT_PORT).get("/train/jobs", timeout_s=2)["data"]
    except ReverieError:
        return []
    return [each["job_id"] for each in found if each["job_id"].startswith(incomplete)]


JobId = Annotated[str, typer.Argument(help="One of 'reverie jobs'.", autocompletion=known_jobs)]


@jobs.callback(invoke_without_command=True)
def default(context: typer.Context, port: Port = DEFAULT_PORT, is_json: Json = False) -> None:
    if context.invoked_subcommand is None:
        list_(port, is_json)


@jobs.command("list")
def list_(port: Port = DEFAULT_PORT, is_json: Json = False) -> None:
    """The newest jobs first."""
    output = Output(is_json)
    found = Server(port).get("/train/jobs")
    made = table("job", "state", "#samples", "steps", "loss", "versions", "posted")
    for each in found["data"]:
        made.add_row(
            each["job_id"],
            _state(each),
            str(each["training_samples"]),
            f"{each['steps']} of {each['total_steps']}",
            _losses(each),
            _versions(each),
            when(each["created"]),
        )
    output.show(found, made if found["data"] else "no jobs yet: 'reverie train FILE' makes one")


@jobs.command("show")
def show(job: JobId, port: Port = DEFAULT_PORT, is_json: Json = False) -> None:
    """One job: its state, losses, versions and settings."""
    output = Output(is_json)
    found = Server(port).get(f"/train/jobs/{job}")
    output.show(found, *_told(found))


@jobs.command("follow")
def follow(job: JobId, port: Port = DEFAULT_PORT, is_json: Json = False) -> None:
    """Show a job's progress until it ends; Ctrl-C ends the showing, not the job."""
    output = Output(is_json)
    server = Server(port)
    with output.steps() as progress:
        ended = until_ended(server, job, progress)
    output.show(ended, *_told(ended))
    require_done(ended)


@jobs.command("cancel")
def cancel(job: JobId, port: Port = DEFAULT_PORT, is_json: Json = False) -> None:
    """Cancel a job that is queued or training; what it has taught stays."""
    output = Output(is_json)
    ended = Server(port).ask("DELETE", f"/train/jobs/{job}")
    output.show(ended, f"{job} is {_state(ended)} after {ended['steps']} steps")


def until_ended(server: Server, job_id: str, progress: Progress) -> dict[str, Any]:
    """The job at its end, shown in `progress` until then; a restart of the cell is waited out."""
    task = progress.add_task(job_id, total=None, note="")
    last_answer = time.monotonic()
    while True:
        try:
            job: dict[str, Any] = server.get(f"/train/jobs/{job_id}")
        except Unreachable as error:
            if time.monotonic() - last_answer > MAX_SILENCE_S:
                raise
            progress.update(task, note=str(error)[:60])
            time.sleep(1.0)
            continue
        last_answer = time.monotonic()
        note = f"loss {loss_of(job['loss_history'][-1])}" if job["loss_history"] else job["status"]
        progress.update(task, total=job["total_steps"] or None, completed=job["steps"], note=note)
        if job["status"] in ENDED:
            return job
        time.sleep(LOOK_INTERVAL_S)


def require_done(job: dict[str, Any]) -> None:
    """Raises Refused if the job has ended otherwise."""
    if job["status"] != "done":
        raise Refused(
            f"{job['job_id']} is {job['status']}: {job['error'] or 'it was asked to end'}"
        )


def summary(job: dict[str, Any]) -> str:
    """One line of a job."""
    return f"{_state(job)}  {progress_of(job)}"


def progress_of(job: dict[str, Any]) -> str:
    """Steps, losses and versions."""
    told = f"{job['steps']} steps"
    if job["loss_history"]:
        told += f", loss {_losses(job)}"
    if job["weights_version"] is not None:
        told += f", version {_versions(job)}"
    return told


def curve(losses: list[float], width: int) -> str:
    """A job's losses as a line, each between the lowest and the highest: in ASCII."""
    if not losses:
        return ""
    every = max(1, -(-len(losses) // width))
    means = [sum(part) / len(part) for part in _parts(losses, every)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(TICKS[round((each - low) / span * (len(TICKS) - 1))] for each in means)


def _parts(losses: list[float], every: int) -> list[list[float]]:
    return [losses[at : at + every] for at in range(0, len(losses), every)]


def _told(job: dict[str, Any]) -> list[str]:
    lines = [f"[bold]{job['job_id']}[/]  {summary(job)}"]
    samples = f"{job['training_samples']} samples, posted {when(job['created'])}"
    pace = f", {job['seconds_per_step']:.2f} s a step" if job.get("seconds_per_step") else ""
    lines.append(samples + pace)
    settings = ", ".join(f"{key} {value}" for key, value in job["config"].items() if value)
    lines.append(f"[dim]{settings}[/]")
    if job.get("trace"):
        lines.append(f"[dim]trace {plain(job['trace'])}[/]")
    if job["loss_history"]:
        lines.append(f"loss  \\[{curve(job['loss_history'], 60)}]")
    if job["error"]:
        lines.append(f"[red]{plain(job['error'])}[/]")
    return lines


def _state(job: dict[str, Any]) -> str:
    colour = COLOURS.get(job["status"], "default")
    return f"[{colour}]{job['status']}[/]"


def _losses(job: dict[str, Any]) -> str:
    history = job["loss_history"]
    return f"{loss_of(history[0])} to {loss_of(history[-1])}" if history else "-"


def _versions(job: dict[str, Any]) -> str:
    before, after = job["weights_version_before"], job["weights_version"]
    if before is None:
        return "-"
    return f"{before} to {after}" if after is not None else f"{before} on"
