"""Runs side by side, as one page: settings and versions that differ, numbers, and pictures.

The page runs nothing and fetches nothing: pictures are inside it. Numbers are those of the JSON
files among the results, by their path; a number is also told as a factor of the first run's.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from command.run_folder import Run

MAX_NUMBERS: Final = 500
"""Of one run: a page of more is not read."""
MAX_FILE_BYTES: Final = 8 * 1024 * 1024
NAMING_KEYS: Final = ("name", "mode", "variant", "kind", "streams", "optimizer", "setting")
"""Keys that name the entries of a list of records, where they have them."""
STYLE: Final = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; }
tr + tr > * { border-top: 1px solid color-mix(in srgb, currentColor 15%, transparent); }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.other { background: color-mix(in srgb, orange 18%, transparent); }
small { opacity: .65; } img { max-width: 100%; background: white; }
figure { margin: 1rem 0; } h2 { margin-top: 2.5rem; font-size: 1.15rem; }
"""


def page(runs: Sequence[tuple[Run, str]], home: Path) -> str:
    """The page for runs and their states; the first is what the others are compared with."""
    titles = [f"{escape(run.id)} <small>{escape(state)}</small>" for run, state in runs]
    settings = [run.settings for run, _ in runs]
    versions = [run.versions for run, _ in runs]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width'><title>Reverie: runs</title>",
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; "
        "style-src 'unsafe-inline'; img-src data:\">",
        f"<style>{STYLE}</style><h1>Runs</h1>",
        *_table("Settings", titles, settings),
        *_table("Versions", titles, versions),
        *_table("Results", titles, [numbers(run, home) for run, _ in runs], is_compared=True),
    ]
    for run, _ in runs:
        parts += _pictures(run, home)
    return "\n".join(parts) + "\n"


def numbers(run: Run, home: Path) -> dict[str, Any]:
    """All numbers in the JSON files of a run, by file and path; of a list of numbers the last."""
    found: dict[str, Any] = {}
    for name in run.results(home):
        path = run.path(home) / name
        if path.suffix not in (".json", ".jsonl") or path.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            text = path.read_text()
            lines = text.splitlines() if path.suffix == ".jsonl" else [text]
            value = [json.loads(line) for line in lines if line.strip()]
        except (ValueError, OSError):
            continue
        made = value if path.suffix == ".jsonl" else value[0]
        if isinstance(made, dict):  # The frame of an experiment says its settings there, too.
            made = {key: part for key, part in made.items() if key not in ("settings", "machine")}
        for at, number in _leaves(made, name):
            if len(found) < MAX_NUMBERS:
                found[at] = number
    return found


def _leaves(value: Any, at: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, bool):
        yield at, str(value).lower()
    elif isinstance(value, int | float):
        yield at, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f"{at} {key}")
    elif isinstance(value, list) and value:
        if all(isinstance(part, int | float) for part in value):
            yield f"{at} (last of {len(value)})", value[-1]
            return
        for number, part in enumerate(value):
            named = [f"{key} {part[key]}" for key in NAMING_KEYS if _names(part, key)]
            yield from _leaves(part, f"{at} {', '.join(named) or number}")


def _names(part: Any, key: str) -> bool:
    return isinstance(part, dict) and isinstance(part.get(key), str | int)


def _table(
    title: str,
    titles: Sequence[str],
    columns: Sequence[Mapping[str, Any]],
    is_compared: bool = False,
) -> Iterator[str]:
    keys = list(dict.fromkeys(key for column in columns for key in column))
    if not keys:
        return
    yield f"<h2>{title}</h2>"
    yield "<table><tr><th></th>" + "".join(f"<th>{each}</th>" for each in titles) + "</tr>"
    for key in keys:
        values = [column.get(key) for column in columns]
        cells = "".join(_cell(each, values[0], is_compared) for each in values)
        yield f"<tr><th>{escape(key)}</th>{cells}</tr>"
    yield "</table>"


def _cell(value: Any, first: Any, is_compared: bool) -> str:
    if value is None:
        return "<td>-</td>"
    if not isinstance(value, int | float):
        mark = " class=other" if value != first else ""
        return f"<td{mark}>{escape(str(value))}</td>"
    text = f"{value:,.6g}"
    if is_compared and isinstance(first, int | float) and first and value != first:
        text += f" <small>{value / first:.2f}x</small>"
    return f"<td class=number>{text}</td>"


def _pictures(run: Run, home: Path) -> Iterator[str]:
    for name in run.results(home):
        path = run.path(home) / name
        if path.suffix == ".png" and path.stat().st_size <= MAX_FILE_BYTES:
            data = base64.b64encode(path.read_bytes()).decode()
            told = escape(f"{run.id}: {name}")
            yield f"<figure><figcaption>{told}</figcaption>"
            yield f"<img alt='{told}' src='data:image/png;base64,{data}'></figure>"
