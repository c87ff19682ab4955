"""Draws the demo as an SVG: the stream's tokens and the loss over one time axis.

Plain text out, no drawing library: the picture is three polylines and some labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Final

WIDTH: Final = 860
LEFT: Final = 70
RIGHT: Final = 20
PANEL_HEIGHT: Final = 130
TOP_OF_GAPS: Final = 112
TOP_OF_LOSS: Final = 284
MAX_CHARS: Final = 110
INK: Final = "#1f2933"
FAINT: Final = "#7b8794"
TOKENS: Final = "#2563eb"
LOSS: Final = "#d97706"
SHADE: Final = "#fef3c7"


@dataclass(frozen=True)
class Recording:
    """What the demo saw; times in seconds since the first streamed token."""

    question: str
    before: str
    after: str
    token_times: Sequence[float]
    step_times: Sequence[float]
    losses: Sequence[float]
    learning: tuple[float, float]
    """When the example was posted and when its job was done."""


def draw(seen: Recording) -> str:
    """The picture as the text of an SVG file."""
    end = max([*seen.token_times, *seen.step_times, seen.learning[1]], default=1.0)
    gaps = [1000 * (b - a) for a, b in pairwise(seen.token_times)]
    highest_gap = max(gaps, default=1.0) * 1.15
    highest_loss = max(seen.losses, default=1.0) * 1.15

    def x(at: float) -> float:
        return LEFT + at / end * (WIDTH - LEFT - RIGHT)

    def y(value: float, highest: float, top: float) -> float:
        return top + PANEL_HEIGHT * (1 - value / highest)

    parts = [_text(20, 28, seen.question, is_title=True)]
    for row, (label, answer) in enumerate((("before", seen.before), ("after", seen.after))):
        parts += [
            _text(20, 50 + 20 * row, label, color=FAINT),
            _text(76, 50 + 20 * row, _cut(answer)),
        ]
    begin, done = (x(at) for at in seen.learning)
    height = TOP_OF_LOSS + PANEL_HEIGHT - TOP_OF_GAPS
    parts.append(
        f'<rect x="{begin:.1f}" y="{TOP_OF_GAPS}" width="{done - begin:.1f}" height="{height}" '
        f'fill="{SHADE}"/>'
    )
    parts.append(_text(begin + 6, TOP_OF_GAPS + 16, "learning"))
    parts += _axes(TOP_OF_GAPS, highest_gap, "ms between streamed tokens", TOKENS)
    parts += _axes(TOP_OF_LOSS, highest_loss, "loss of the taught answer", LOSS)
    gap_points = [
        (x(at), y(gap, highest_gap, TOP_OF_GAPS))
        for at, gap in zip(seen.token_times[1:], gaps, strict=True)
    ]
    loss_points = [
        (x(at), y(loss, highest_loss, TOP_OF_LOSS))
        for at, loss in zip(seen.step_times, seen.losses, strict=True)
    ]
    parts.append(_line(gap_points, TOKENS, 1))
    parts.append(_line(loss_points, LOSS, 2))
    parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{LOSS}"/>' for a, b in loss_points]
    bottom = TOP_OF_LOSS + PANEL_HEIGHT
    parts += [
        _text(x(end * part / 4) - 8, bottom + 18, f"{end * part / 4:.0f} s") for part in range(5)
    ]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 30}" '
        f'font-family="sans-serif" font-size="13" fill="{INK}">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 3] + "..."


def _axes(top: float, highest: float, label: str, color: str) -> list[str]:
    bottom = top + PANEL_HEIGHT
    return [
        f'<path d="M{LEFT} {top} V{bottom} H{WIDTH - RIGHT}" fill="none" stroke="{INK}"/>',
        _text(LEFT + 4, top - 6, label, color=color),
        _text(LEFT - 46, top + 12, f"{highest:.3g}"),
        _text(LEFT - 18, bottom, "0"),
    ]


def _line(points: Sequence[tuple[float, float]], color: str, width: int) -> str:
    joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    return f'<polyline points="{joined}" fill="none" stroke="{color}" stroke-width="{width}"/>'


def _text(at_x: float, at_y: float, text: str, is_title: bool = False, color: str = INK) -> str:
    weight = ' font-weight="bold" font-size="15"' if is_title else ""
    return f'<text x="{at_x:.1f}" y="{at_y:.1f}" fill="{color}"{weight}>{escape(text)}</text>'
