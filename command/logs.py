"""`reverie logs`: what the cell's actors, its ingress and submitted jobs have written, as files.

Ray gives each process two files and writes the actor's class on their first lines; that is how they
are found, so that a cell which has ended can be read too. Nothing here asks a server.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from actors.errors import SettingsError
from actors.home import default_home
from command import record
from command.flow import printable
from command.options import DEFAULT_PORT, Json, Port
from command.output import Output, plain, table

CLASS_OF: Final = {
    "cell": "Cell",
    "engine": "Engine",
    "trainer": "Trainer",
    "checkpoint": "Checkpointer",
    "dream": "Dreamer",
    "ingress": "ServeReplica:reverie:ingress",
}
"""The line that Ray writes for a role's actor."""
JOB_PREFIX: Final = "job-driver-"
TAIL_BYTES: Final = 1024 * 1024
MARK_BYTES: Final = 512
LOOK_INTERVAL_S: Final = 0.3


@dataclass
class Source:
    """One file, and how much of it has been shown."""

    name: str
    path: Path
    at: int = 0
    rest: bytes = field(default=b"", repr=False)

    def last(self, num_lines: int) -> list[str]:
        """Its last lines; from here on `more` goes on."""
        self.at = self.path.stat().st_size
        with self.path.open("rb") as file:
            file.seek(max(0, self.at - TAIL_BYTES))
            read = file.read(self.at - file.tell())
        found = [line for line in read.decode(errors="replace").splitlines() if line[:1] != ":"]
        return found[-num_lines:] if num_lines else []

    def more(self) -> list[str]:
        """Whole lines that were written since."""
        with self.path.open("rb") as file:
            file.seek(self.at)
            read = file.read(TAIL_BYTES)
        self.at += len(read)
        *whole, self.rest = (self.rest + read).split(b"\n")
        return [line.decode(errors="replace") for line in whole]


def logs(
    name: Annotated[
        str | None,
        typer.Argument(help=f"{', '.join(CLASS_OF)}, or a job; left out: what there is."),
    ] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", help="So many of the last.")] = 40,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on, until Ctrl-C.")] = False,
    port: Port = DEFAULT_PORT,
    is_json: Json = False,
) -> None:
    """What the cell's processes and submitted jobs have written."""
    output = Output(is_json)
    if follow and is_json:
        raise SettingsError("--follow has no end, and --json is one document; leave one out")
    if lines < 0:
        raise SettingsError(f"--lines {lines}: it cannot be negative").about("lines")
    folder = folder_of(default_home(), port)
    found = sources(folder)
    if name is None:
        _list(found, output)
        return
    chosen = [each for each in found if each.name.partition(".")[0] == name]
    if not chosen:
        known = sorted({each.name.partition(".")[0] for each in found})
        raise SettingsError(f"{name}: there is no log of it; there are {', '.join(known)}").about(
            "name"
        )
    shown = [(each, each.last(lines)) for each in chosen]
    document = {"data": [{"name": s.name, "path": str(s.path), "lines": text} for s, text in shown]}
    output.show(document)
    for source, text in shown:
        if text:
            output.say(f"[dim]{source.name}[/]")
        _print(text, output)
    if follow:
        _follow(chosen, folder, name, output)


def folder_of(home: Path, port: int) -> Path:
    """Ray's log folder of the cell at `port`; of the newest Ray if none was started by `up`."""
    found = record.read(home, port)
    places = [Path(found.session_dir)] if found is not None and found.session_dir else []
    places.append(Path("/tmp/ray/session_latest"))
    for place in places:
        if (place / "logs").is_dir():
            return place / "logs"
    raise SettingsError(
        f"port={port}: no cell was started there from this REVERIE_HOME, and no Ray has run here"
    ).about("port")


def sources(folder: Path) -> list[Source]:
    """The newest files of every role, and those of jobs."""
    newest: dict[str, tuple[float, Source]] = {}
    for path in folder.glob("worker-*"):
        role = _role_of(path)
        if role is None or path.suffix not in (".out", ".err"):
            continue
        source = Source(role + path.suffix, path)
        at = path.stat().st_mtime
        if source.name not in newest or newest[source.name][0] < at:
            newest[source.name] = at, source
    for path in folder.glob("serve/replica_reverie_ingress_*.log"):
        at = path.stat().st_mtime
        if newest.get("ingress.log", (0.0,))[0] < at:
            newest["ingress.log"] = at, Source("ingress.log", path)
    jobs = [
        Source(path.stem.removeprefix(JOB_PREFIX) + ".log", path)
        for path in sorted(folder.glob(f"{JOB_PREFIX}*.log"))
    ]
    order = list(CLASS_OF)
    found = [source for _, source in newest.values()]
    found.sort(key=lambda each: (order.index(each.name.partition(".")[0]), each.name))
    return found + jobs


def _role_of(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            head = file.read(MARK_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return None
    for role, name in CLASS_OF.items():
        if f":actor_name:{name}" in head:
            return role
    return None


def _list(found: list[Source], output: Output) -> None:
    made = table("log", "#KiB", "file")
    shown: list[dict[str, Any]] = []
    for each in found:
        size = each.path.stat().st_size
        shown.append({"name": each.name, "path": str(each.path), "size_bytes": size})
        made.add_row(each.name, f"{size / 1024:.1f}", each.path.name)
    output.show({"data": shown}, made)


def _follow(chosen: list[Source], folder: Path, name: str, output: Output) -> None:
    """Until Ctrl-C; a process that is started anew is followed in its new files."""
    try:
        while True:
            for each in chosen:
                _print(each.more(), output)
            known = {each.path for each in chosen}
            chosen += [
                each
                for each in sources(folder)
                if each.name.partition(".")[0] == name and each.path not in known
            ]
            time.sleep(LOOK_INTERVAL_S)
    except KeyboardInterrupt:
        output.note("")


def _print(text: Iterator[str] | list[str], output: Output) -> None:
    if output.is_json:
        return
    for line in text:
        # Not through the layout: a line of a log stays one, and keeps its own words.
        if output.console.record:
            output.console.print(plain(line), soft_wrap=True)
        else:
            print(printable(line) if output.console.is_terminal else line)
    sys.stdout.flush()
