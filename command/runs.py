"""`reverie runs`: experiments that were submitted; their state, their output, and their results.

its folder --> how it ended        Ray's jobs --> whether it still runs, and what it prints
"""

import logging
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from actors.errors import ReverieError, SettingsError
from actors.home import default_home
from command import record, run_folder
from command.client import Refused, Unreachable
from command.options import Json
from command.output import Output, plain, table, when
from command.record import CellRecord
from command.run_folder import LOG, Run

LOOK_INTERVAL_S: Final = 0.5
MAX_COMPARED: Final = 10
RAY_STATES: Final = {"SUCCEEDED": "done", "FAILED": "failed", "STOPPED": "stopped"}

runs = typer.Typer(help="Submitted experiments: list, show, follow, stop, report.")


def known_runs(incomplete: str) -> list[str]:
    """For completion."""
    found = [each.id for each in run_folder.every(default_home())]
    return [name for name in found if name.startswith(incomplete)]


RunId = Annotated[str, typer.Argument(help="One of 'reverie runs'.", autocompletion=known_runs)]


def client_at(dashboard: str, cell: CellRecord | None) -> Any:
    """Ray's client of jobs, with the token if the cluster has one."""
    if cell is not None and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = cell.auth_mode
    from ray.job_submission import JobSubmissionClient

    for name in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(dashboard)
    except (ConnectionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise Unreachable(
            f"address={dashboard}: Ray's dashboard does not take jobs there ({reason}); "
            "see 'reverie doctor'"
        ).about("address") from None


def to_the_end(made: Run, home: Path, output: Output) -> None:
    """Show what the run prints until it ends, and then what it has made."""
    import asyncio

    client = _client_of(made, home)
    try:
        text = asyncio.run(_tail(client, made.id, output))
    except KeyboardInterrupt:
        output.note(f"it goes on: 'reverie runs follow {made.id}', 'reverie runs stop {made.id}'")
        raise
    (made.path(home) / LOG).write_text(text)
    state = state_of(made, home, client)
    output.show(document(made, home, state), *_told(made, home, state))
    if state != "done":
        raise Refused(f"{made.id} {state}; see {made.path(home) / LOG}")


async def _tail(client: Any, name: str, output: Output) -> str:
    import asyncio

    parts = []
    async for piece in client.tail_job_logs(name):
        parts.append(piece)
        if not output.is_json:
            output.console.print(plain(piece), end="", soft_wrap=True)
    while str(client.get_job_status(name)) in ("PENDING", "RUNNING"):
        await asyncio.sleep(LOOK_INTERVAL_S)
    return "".join(parts)


def _client_of(made: Run, home: Path) -> Any:
    cells = [record.read(home, port) for port in record.ports(home)]
    mine = [each for each in cells if each is not None and each.dashboard == made.dashboard]
    return client_at(made.dashboard, mine[0] if mine else None)


def state_of(made: Run, home: Path, client: Any = None) -> str:
    """From its folder; while that does not say, from Ray, if it is still there."""
    if found := made.ended(home):
        return found[0]
    if client is None:
        try:
            client = _client_of(made, home)
        except ReverieError:
            return "stopped" if made.is_stopped else "lost"
    try:
        told = str(client.get_job_status(made.id).value)
    except (RuntimeError, ConnectionError):
        return "stopped" if made.is_stopped else "lost"  # That Ray, or its job, is gone.
    return RAY_STATES.get(told, "running")


@runs.callback(invoke_without_command=True)
def default(context: typer.Context, is_json: Json = False) -> None:
    if context.invoked_subcommand is None:
        list_(is_json)


@runs.command("list")
def list_(is_json: Json = False) -> None:
    """The newest first."""
    output, home = Output(is_json), default_home()
    found = [(each, state_of(each, home)) for each in run_folder.every(home)]
    made = table("run", "state", "begun", "#seconds", "results")
    for each, state in found:
        results = ", ".join(each.results(home)) or "-"
        made.add_row(each.id, _coloured(state), when(each.created), _seconds(each, home), results)
    shown = {"data": [document(each, home, state) for each, state in found]}
    output.show(shown, made if found else "no runs yet: 'reverie submit' lists experiments")


@runs.command("show")
def show(run: RunId, is_json: Json = False) -> None:
    """One run: its settings, versions and results."""
    output, home = Output(is_json), default_home()
    made = run_folder.find(home, run)
    state = state_of(made, home)
    output.show(document(made, home, state), *_told(made, home, state))


@runs.command("follow")
def follow(run: RunId, is_json: Json = False) -> None:
    """Show what a run prints, until it ends."""
    output, home = Output(is_json), default_home()
    to_the_end(run_folder.find(home, run), home, output)


@runs.command("stop")
def stop(run: RunId, is_json: Json = False) -> None:
    """End a run that goes on; what it has made stays."""
    output, home = Output(is_json), default_home()
    made = run_folder.find(home, run)
    client = _client_of(made, home)
    state = state_of(made, home, client)
    if state == "running":
        made = made.stopped()
        made.save(home)
        with output.waiting("stopping"):
            client.stop_job(made.id)
            while state == "running":
                time.sleep(LOOK_INTERVAL_S)
                state = state_of(made, home, client)
    output.show(document(made, home, state), f"{made.id} {state}")


def document(made: Run, home: Path, state: str) -> dict[str, Any]:
    found = made.ended(home)
    return asdict(made) | {
        "state": state,
        "ended": None if found is None else found[1],
        "directory": str(made.path(home)),
        "results": made.results(home),
    }


def _told(made: Run, home: Path, state: str) -> list[Any]:
    facts = table()
    facts.show_header = False
    facts.add_column()
    facts.add_column()
    facts.add_row("[dim]settings[/]", plain(" ".join(f"{k}={v}" for k, v in made.settings.items())))
    facts.add_row("[dim]versions[/]", " ".join(f"{k} {v}" for k, v in made.versions.items()))
    for name, size in made.results(home).items():
        facts.add_row("[dim]result[/]", f"{made.path(home) / name}  ({size} bytes)")
    return [f"[bold]{made.id}[/]  {_coloured(state)}  {_seconds(made, home)} s", facts]


def _seconds(made: Run, home: Path) -> str:
    found = made.ended(home)
    return f"{(found[1] if found else time.time()) - made.created:.0f}"


def _coloured(state: str) -> str:
    colour = {"done": "green", "failed": "red", "running": "cyan"}.get(state, "yellow")
    return f"[{colour}]{state}[/]"


@runs.command("report")
def report(
    run: Annotated[
        list[str] | None,
        typer.Argument(
            help="Of 'reverie runs', the first of them to compare with.", autocompletion=known_runs
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page; runs/report.html if left out.")
    ] = None,
    is_json: Json = False,
) -> None:
    """Compare runs on one page: what was set, what came out; the newest ten if none is named."""
    from command.run_report import page

    output, home = Output(is_json), default_home()
    named = [run_folder.find(home, name) for name in run or ()]
    chosen = named or run_folder.every(home)[:MAX_COMPARED]
    if not chosen:
        raise SettingsError("there are no runs yet: 'reverie submit' lists experiments")
    path = out or home / "runs" / "report.html"
    try:
        path.write_text(page([(each, state_of(each, home)) for each in chosen], home))
    except OSError as error:
        raise SettingsError(f"--out {path}: {error.strerror}").about("out") from None
    output.show({"report": str(path), "runs": [each.id for each in chosen]}, str(path))
