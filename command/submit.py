"""`reverie submit`: an experiment as a job of the cell's Ray, its results in one folder.

    a snapshot of the checkout --> Ray's job --> REVERIE_HOME/runs/ID: settings, versions, results

As `ray job submit` with the interpreter of this environment, the address and the token of the cell
that runs, and a working directory in which every relative path of the experiment ends up.
"""

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Final

import typer

from actors.errors import SettingsError
from actors.home import default_home
from command import experiments, record, run_folder
from command.client import Unreachable
from command.options import DEFAULT_PORT, Json, Port, pairs_of
from command.output import Output, plain, table
from command.record import CellRecord
from command.run_folder import Run
from command.runs import client_at, document, to_the_end

EXCLUDED: Final = (".git", ".venv", "docs", "**/__pycache__", ".*_cache")
"""Of the checkout, what no experiment reads."""

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
        output.show(document(made, home, "running"))
        return
    to_the_end(made, home, output)


def _list_experiments(output: Output) -> None:
    found = [experiments.find(name) for name in experiments.names()]
    made = table("experiment", "about", "takes")
    for each in found:
        made.add_row(each.name, plain(each.about), " ".join(each.options))
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
    client = client_at(dashboard, cell)
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
