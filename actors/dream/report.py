"""A round as one page of HTML: what was learned and why, the loss, and what the gate saw.

Nothing is fetched, nothing is run: text, a table and drawings in the page itself.
"""

from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import Any, Final

from actors.dream.gate import Measurement
from actors.dream.records import Attempt, Item, Round

WIDTH, HEIGHT, MARGIN = 640, 160, 28
STYLE: Final = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem;
  border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent); }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.kept { color: light-dark(#14652f, #7fd69a); }
.dropped, .fault { color: light-dark(#8a3b12, #f0a57d); }
svg { max-width: 100%; height: auto; }
polyline { fill: none; stroke: currentColor; stroke-width: 1.5; }
line { stroke: currentColor; opacity: .3; }
text { fill: currentColor; font-size: 11px; }
"""


def page(of: Round, items: Sequence[Item]) -> str:
    """The whole document."""
    kept = [item for item in items if item.is_kept]
    dropped = [item for item in items if not item.is_kept]
    body = [
        f"<h1>{_text(of.id)}: {_text(of.behaviour)}</h1>",
        f'<p class="{"kept" if of.state == "passed" else "fault"}"><b>{_text(of.state)}</b>'
        f"{': ' + _text(of.reason) if of.reason else ''}</p>",
        _facts(of, len(kept), len(dropped)),
        "<h2>The gate</h2>",
        _gate(of),
        *(_attempt(attempt, at) for at, attempt in enumerate(of.attempts, 1)),
        f"<h2>{'Learned' if of.state == 'passed' else 'Kept'} ({len(kept)})</h2>",
        _items(kept),
        f"<h2>Dropped ({len(dropped)})</h2>",
        _items(dropped),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(of.id)}</title><style>{STYLE}</style></head><body>"
        f"{''.join(body)}</body></html>"
    )


def _facts(of: Round, num_kept: int, num_dropped: int) -> str:
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in of.seconds.items())
    rows = [
        ("scenarios", of.counts.get("scenarios", 0)),
        ("answers kept / dropped", f"{num_kept} / {num_dropped}"),
        ("rehearsed / replayed", f"{of.counts.get('rehearsal', 0)} / {of.counts.get('replay', 0)}"),
        ("steps", of.num_steps),
        ("tokens read and written", of.tokens),
        ("sampling temperature", f"{of.temperature:.2f}"),
        ("generation before it", "none" if of.generation is None else of.generation),
        ("time", stages),
    ]
    return _table([], rows)


def _gate(of: Round) -> str:
    """Every measure before the round and after each training."""
    columns: list[dict[str, Any]] = [of.before or {}]
    columns += [attempt.measured or {} for attempt in of.attempts]
    names = list(asdict(Measurement(0, 0, 0, 0, 0, 0, 0)))
    rows = [(name, *(_number(column.get(name)) for column in columns)) for name in names]
    tests: list[dict[str, float]] = [of.success_before]
    tests += [attempt.success or {} for attempt in of.attempts]
    for name in dict.fromkeys(key for test in tests for key in test):
        rows.append((f"success, {name}", *(_number(test.get(name)) for test in tests)))
    heads = [f"try {at}" for at in range(1, len(of.attempts) + 1)]
    return _table(["measure", "before", *heads], rows)


def _attempt(attempt: Attempt, number: int) -> str:
    faults = "".join(f'<li class="fault">{_text(fault)}</li>' for fault in attempt.faults)
    return (
        f"<h2>Try {number}, learning rate {attempt.learning_rate:g}</h2>"
        + (f"<ul>{faults}</ul>" if faults else "<p>Within every budget.</p>")
        + _curve(attempt.loss_history)
    )


def _curve(losses: Sequence[float]) -> str:
    """Loss by step."""
    if len(losses) < 2:
        return ""
    highest = max(max(losses), 1e-9)
    across = (WIDTH - 2 * MARGIN) / (len(losses) - 1)
    down = HEIGHT - 2 * MARGIN
    points = " ".join(
        f"{MARGIN + at * across:.1f},{MARGIN + down * (1 - loss / highest):.1f}"
        for at, loss in enumerate(losses)
    )
    floor = HEIGHT - MARGIN
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss by step">'
        f'<line x1="{MARGIN}" y1="{floor}" x2="{WIDTH - MARGIN}" y2="{floor}"/>'
        f'<polyline points="{points}"/>'
        f'<text x="2" y="{MARGIN}">{highest:.1f}</text><text x="8" y="{floor}">0</text>'
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 8}" text-anchor="end">'
        f"{len(losses)} steps, loss in nats per token</text></svg>"
    )


def _items(items: Sequence[Item]) -> str:
    rows = []
    for item in items:
        what = item.kind if item.is_kept else item.reason or ""
        value = "" if item.divergence is None else f"{item.divergence:.2f}"
        rows.append((item.situation, item.answer, value, what))
    return _table(["situation", "answer", "divergence", "kind, or why it was dropped"], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{_text(each)}</th>" for each in heads)
    lines = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table>{f'<tr>{head}</tr>' if head else ''}{lines}</table>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _text(value: Any) -> str:
    return escape(str(value))
