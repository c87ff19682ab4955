"""`reverie submit`: an experiment as a job of the cell's Ray, its results in one folder.

    a snapshot of the checkout --> Ray's job --> REVERIE_HOME/runs/ID: settings, versions, results

As `ray job submit` with the interpreter of this environment, the address and the token of the cell
that runs, and a working directory in which every relative path of the experiment ends up.
"""

import logging
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.markup import escape

from actors.errors import ReverieError, SettingsError
from actors.home import default_home
from command import experiments, record, run_folder
from command.client import Refused, Unreachable
from command.options import DEFAULT_PORT, Json, Port, pairs_of
from command.output import Output, table, when
from command.record import CellRecord
from command.run_folder import LOG, Run

EXCLUDED: Final = (".git", ".venv", "docs", "tests", "**/__pycache__", ".*_cache")
"""Of the checkout, what no experiment reads."""
LOOK_INTERVAL_S: Final = 0.5
RAY_STATES: Final = {"SUCCEEDED": "done", "FAILED": "failed", "STOPPED": "stopped"}

runs = typer.Typer(help="Submitted experiments: list, show, follow, stop.")


def known_runs(incomplete: str) -> list[str]:
    """For completion."""
    found = [each.id for each in run_folder.every(default_home())]
    return [name for name in found if name.startswith(incomplete)]


RunId = Annotated[str, typer.Argument(help="One of 'reverie runs'.", autocompletion=known_runs)]
Name = Annotated[
    str | None,
    typer.Argument(
        help="Of the experiment; left out: what there is.", autocompletion=experiments.names
    ),
]
Address = Annotated[
    str | None,
    typer.Option(help="Of Ray's dashboard, http://HOST:PORT; left out: that of the cell."),
]


def submit(
    name: Name = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="An argument of it, as key=value.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the end.")] = False,
    address: Address = None,
    port: Port = DEFAULT_PORT,
    is_json: Json = False,
) -> None:
    """Run an experiment as a Ray job, and collect its results; Ctrl-C ends the showing only."""
    output, home = Output(is_json), default_home()
    if name is None:
        _list_experiments(output)
        return
    experiment = experiments.find(name)
    given = pairs_of(set_, "key=value")
    experiment.arguments(given)
    cell, dashboard = _cluster(home, port, address)
    settings = experiment.defaults(home, f"http://127.0.0.1:{port}") | given
    with output.waiting("packing the checkout"):
        made = _send(home, port, experiment, settings, cell, dashboard)
    place = made.path(home)
    output.say(f"[bold]{made.id}[/]  results in {place}")
    if detach:
        output.show(_document(made, home, "running"))
        return
    _to_the_end(made, home, output)


def _list_experiments(output: Output) -> None:
    found = [experiments.find(name) for name in experiments.names()]
    made = table("experiment", "about", "takes")
    for each in found:
        made.add_row(each.name, escape(each.about), " ".join(each.options))
    shown = [
        {
            "name": each.name,
            "about": each.about,
            "options": {
                key: {"help": option.help, "default": option.default}
                for key, option in each.options.items()
            },
        }
        for each in found
    ]
    output.show({"data": shown}, made)


def _cluster(home: Path, port: int, address: str | None) -> tuple[CellRecord | None, str]:
    """The cell's record, if it runs, and the address of Ray's dashboard."""
    found = record.read(home, port)
    if found is not None and found.process() is None:
        found = None
    dashboard = address or (found.dashboard if found is not None else "")
    dashboard = dashboard or os.environ.get("RAY_API_SERVER_ADDRESS", "")
    if not dashboard:
        raise Unreachable(
            f"port={port}: no cell runs there from this REVERIE_HOME, so no Ray is known; start "
            "'reverie up', or name Ray's dashboard with --address http://HOST:PORT"
        ).about("port")
    if not dashboard.startswith(("http://", "https://")):
        raise SettingsError(f"--address {dashboard}: write it as http://HOST:PORT").about("address")
    return found, dashboard


def _send(
    home: Path,
    port: int,
    experiment: experiments.Experiment,
    settings: dict[str, str],
    cell: CellRecord | None,
    dashboard: str,
) -> Run:
    root = experiments.root()
    client = _client(dashboard, cell)
    name, place = run_folder.create(home, experiment.name)
    words = [sys.executable, "-m", f"{experiments.FOLDER}.{experiment.name}"]
    command = shlex.join(words + experiment.arguments(settings))
    ending = f"echo $code > {run_folder.EXIT_CODE}; exit $code"
    # Ray itself names any cluster of this machine, where there are several.
    told = f"export RAY_ADDRESS={shlex.quote(cell.ray_address)};" if cell is not None else ""
    entrypoint = (
        f'cd {shlex.quote(str(place))} && export PYTHONPATH="$OLDPWD"; {told} '
        f"{command}; code=$?; {ending}"
    )
    made = Run(
        id=name,
        experiment=experiment.name,
        settings=settings,
        entrypoint=command,
        dashboard=dashboard,
        created=time.time(),
        versions=run_folder.versions(root),
    )
    made.save(home)
    client.submit_job(
        submission_id=name,
        entrypoint=entrypoint,
        runtime_env={
            "working_dir": str(root),
            "excludes": list(EXCLUDED),
            "env_vars": _environment(home, port),
        },
        metadata={"experiment": experiment.name, **settings},
    )
    return made


def _environment(home: Path, port: int) -> dict[str, str]:
    """What the job's processes are told; never a key, which Ray's dashboard would show."""
    made = {
        "REVERIE_HOME": str(home),
        "REVERIE_PORT": str(port),
        "MPLBACKEND": "Agg",
        "PYTHONUNBUFFERED": "1",
    }
    if named := os.environ.get("REVERIE_KEY_FILE"):
        made["REVERIE_KEY_FILE"] = str(Path(named).expanduser().absolute())
    return made


def _client(dashboard: str, cell: CellRecord | None) -> Any:
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


def _to_the_end(made: Run, home: Path, output: Output) -> None:
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
    output.show(_document(made, home, state), *_told(made, home, state))
    if state != "done":
        raise Refused(f"{made.id} {state}; see {made.path(home) / LOG}")


async def _tail(client: Any, name: str, output: Output) -> str:
    import asyncio

    parts = []
    async for piece in client.tail_job_logs(name):
        parts.append(piece)
        if not output.is_json:
            output.console.print(escape(piece), end="", soft_wrap=True)
    while str(client.get_job_status(name)) in ("PENDING", "RUNNING"):
        await asyncio.sleep(LOOK_INTERVAL_S)
    return "".join(parts)


def _client_of(made: Run, home: Path) -> Any:
    cells = [record.read(home, port) for port in record.ports(home)]
    mine = [each for each in cells if each is not None and each.dashboard == made.dashboard]
    return _client(made.dashboard, mine[0] if mine else None)


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
    shown = {"data": [_document(each, home, state) for each, state in found]}
    output.show(shown, made if found else "no runs yet: 'reverie submit' lists experiments")


@runs.command("show")
def show(run: RunId, is_json: Json = False) -> None:
    """One run: its settings, versions and results."""
    output, home = Output(is_json), default_home()
    made = run_folder.find(home, run)
    state = state_of(made, home)
    output.show(_document(made, home, state), *_told(made, home, state))


@runs.command("follow")
def follow(run: RunId, is_json: Json = False) -> None:
    """Show what a run prints, until it ends."""
    output, home = Output(is_json), default_home()
    _to_the_end(run_folder.find(home, run), home, output)


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
    output.show(_document(made, home, state), f"{made.id} {state}")


def _document(made: Run, home: Path, state: str) -> dict[str, Any]:
    from dataclasses import asdict

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
    facts.add_row(
        "[dim]settings[/]", escape(" ".join(f"{k}={v}" for k, v in made.settings.items()))
    )
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
