"""What all experiments share: arguments, progress, results with what they depend on, pictures.

    parser --begin--> options         say --> [  12.3 s] on stdout at once, also in a job's log
    Finished    runs as lines of a file: an experiment that was cut goes on where it was
    keep        a JSON of what was found, beside settings, versions, machine and seconds
    figure      matplotlib's, without a screen

Knows no experiment, and imports nothing that is slow to import. Every experiment is a script with
a docstring whose first line says what it shows, and takes the same words for the same things:
--out finished runs, --json the summary, --plot the picture, --seed, --threads of torch.
"""

import argparse
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from command.run_folder import versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI: Final = 130
SECRETS: Final = {"key"}
"""Settings that are kept nowhere."""
_BEGUN: Final = time.monotonic()


def parser(doc: str | None) -> argparse.ArgumentParser:
    """For the arguments of the script with this docstring."""
    return argparse.ArgumentParser(description=(doc or "").partition("\n")[0])


def begin(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line. From here on a polite end (SIGTERM) cleans up as Ctrl-C does."""
    options = made.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    if getattr(options, "threads", None):
        import torch

        torch.set_num_threads(options.threads)
    return options


def say(text: str) -> None:
    """One line of progress, with the seconds since the beginning."""
    print(f"[{seconds():7.1f} s] {text}", flush=True)


def seconds() -> float:
    """Since the experiment began."""
    return time.monotonic() - _BEGUN


class Finished:
    """Runs that are finished, a line of JSON each; what a kill left half written is dropped."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self.rows: list[dict[str, Any]] = []
        if self._path.exists():
            text = self._path.read_text()
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                os.truncate(self._path, len(whole.encode()))
            self.rows = [json.loads(line) for line in whole.splitlines()]

    def add(self, row: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)


def keep(path: str | Path | None, options: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """Write what was found, if that is wanted, whole or not at all."""
    if path is None:
        return
    known = {name: value for name, value in vars(options).items() if name not in SECRETS}
    settings = {name: _plain(value) for name, value in sorted(known.items())}
    made = {
        "experiment": Path(sys.argv[0]).stem,
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds(), 1),
        "settings": settings,
        "versions": versions(Path(__file__).parents[1]),
        "machine": machine(),
        **found,
    }
    draft = Path(f"{path}.draft")
    draft.write_text(json.dumps(made, indent=1) + "\n")
    draft.replace(path)


def machine() -> dict[str, Any]:
    """What a time depends on."""
    load, cores = os.getloadavg()[0], os.cpu_count()
    found: dict[str, Any] = {"cores": cores, "load": round(load, 1), "kernel": platform.release()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches; save it with `draw_to`."""
    from matplotlib.figure import Figure  # Only a picture needs it.

    return Figure(figsize=(width, height), layout="constrained")


def draw_to(path: str | Path, made: "Figure") -> None:
    made.savefig(path, dpi=DPI)


def _plain(value: Any) -> Any:
    """As JSON."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (int, float, bool, type(None))) else str(value)
