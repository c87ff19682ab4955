"""How a command speaks: text and tables for people, or one JSON document; never both.

    stdout    what was asked for: a rendering, or with --json exactly one document
    stderr    progress, on a terminal only; notes; errors, one line each

Colour is rich's: none where NO_COLOR is set, or where nobody looks. Knows no servers.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from actors.errors import ReverieError
from command.flow import printable

PIPED_WIDTH: Final = 240
"""Columns where nobody looks, so that a line stays one for `grep`."""
MAX_WIDTH: Final = 110
"""Wider lines of prose are hard to read."""
PICTURE_WIDTH: Final = 96
SVG: Final = """<svg class="rich-terminal" viewBox="0 0 {width} {height}"
    xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: monospace; font-size: {char_height}px;
  line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""
"""rich's picture of a terminal, without the fonts that it would fetch from a foreign host."""


class Output:
    """What one command prints. The newest one is `current`: an error is told in its form."""

    current: "Output"
    console = Console(highlight=False, emoji=False)
    errors = Console(highlight=False, emoji=False, stderr=True)

    def __init__(self, is_json: bool = False) -> None:
        self.is_json = is_json
        self.is_told = False
        """Whether the document was printed; there is one."""
        if not self.console.is_terminal and "COLUMNS" not in os.environ:
            self.console.width = PIPED_WIDTH
        Output.current = self

    def show(self, document: Any, *for_people: RenderableType) -> None:
        """Print the document, or what stands for it where people read."""
        if self.is_json:
            self.is_told = True
            print(json.dumps(document, indent=2), flush=True)
            return
        for each in for_people:
            self.console.print(each)

    def say(self, text: RenderableType = "") -> None:
        """One line for people; nothing in JSON."""
        if not self.is_json:
            self.console.print(text)

    def note(self, text: str) -> None:
        """Something beside the point, on stderr; nothing in JSON."""
        if not self.is_json:
            self.errors.print(text, style="dim")

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """A spinner with the seconds so far, while the body runs."""
        with self.progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        ) as it:
            it.add_task(text, total=None)
            yield

    def progress(self, *columns: Any) -> Progress:
        """A bar on stderr; where that is no terminal, nothing at all."""
        return Progress(
            *columns,
            console=self.errors,
            transient=True,
            disable=not self.errors.is_terminal,
        )

    def steps(self) -> Progress:
        """A bar of optimizer steps, or of anything else that is counted, with a note beside it."""
        return self.progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
        )

    def confirm(self, question: str, is_sure: bool) -> None:
        """Ask, where somebody sits; raises typer.Abort for a no."""
        if not is_sure and not self.is_json and sys.stdin.isatty():
            typer.confirm(question, abort=True, err=True)

    @property
    def prose_width(self) -> int:
        return min(self.console.width, MAX_WIDTH)


def fail(error: ReverieError) -> None:
    """The one line of an error, on stderr; with --json also as the document, if there is none."""
    if Output.current.is_json and not Output.current.is_told:
        told = {"type": error.kind, "message": str(error), "param": error.param}
        print(json.dumps({"error": told}, indent=2), flush=True)
    print(f"reverie: {printable(str(error))}", file=sys.stderr)


def table(*columns: str, title: str | None = None) -> Table:
    """A table without lines; a column whose name begins with # is a number."""
    made = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left", title_style="")
    for name in columns:
        is_number = name.startswith("#")
        made.add_column(
            name.removeprefix("#"),
            justify="right" if is_number else "left",
            header_style="bold",
            overflow="fold",
            no_wrap=is_number,
        )
    return made


def plain(text: str) -> str:
    """What others have written, for a line of ours: nothing in it is markup, or a command."""
    return escape(printable(text))


def when(created: float) -> str:
    """A moment, in this machine's time."""
    return datetime.fromtimestamp(created).isoformat(" ", "seconds")


def loss_of(value: float | None) -> str:
    """A loss with the digits that mean something."""
    if value is None:
        return "-"
    return f"{value:.2g}" if 0 < value < 0.01 else f"{value:.3f}"


@contextmanager
def drawn(path: Path, title: str) -> Iterator[None]:
    """Whatever is printed for people while the body runs, also as the SVG file `path`."""
    Output.console = Console(
        highlight=False,
        emoji=False,
        record=True,
        width=PICTURE_WIDTH,
        force_terminal=True,
        color_system="truecolor",
    )
    try:
        yield
    finally:
        path.write_text(Output.console.export_svg(title=title, code_format=SVG))


Output.current = Output()
