"""Which generations have learned what: lines of descent, returns, and what was thinned out."""

from typing import Any

import pytest

from actors.dream.descent import Span, holding
from actors.messages import GenerationView


def view(generation: int, version: int, parent: int | None, to: int | None = None) -> Any:
    kind = "base" if parent is None else "delta"
    return GenerationView(
        generation, kind, parent, version, 0.0, 1, False, False, returns_to=to, root=""
    )


LINE = [view(3, 12, 2), view(2, 9, 1), view(1, 4, 0), view(0, 0, None)]
RETURNED = [view(5, 15, 4), view(4, 13, 3, to=1), *LINE]


@pytest.mark.parametrize(
    ("spans", "generations", "found"),
    [
        ([(7, 8)], LINE, (3, 2)),
        ([(4, 5)], LINE, (3, 2)),
        ([(3, 5)], LINE, (3, 2, 1)),
        ([(9, 11)], LINE, (3,)),
        ([(12, 13)], LINE, ()),
        ([], LINE, ()),
        ([(1, 2), (10, 11)], LINE, (3, 2, 1)),
        ([(7, 8)], RETURNED, (3, 2)),
        ([(13, 14)], RETURNED, (5,)),
        ([(2, 3)], RETURNED, (5, 4, 3, 2, 1)),
        ([(7, 8), (13, 15)], RETURNED, (5, 3, 2)),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_a_generation_holds_what_was_learned_on_its_own_way(
    spans: list[Span], generations: list[GenerationView], found: tuple[int, ...]
) -> None:
    assert holding(spans, generations) == found


def test_where_a_return_was_thinned_out_too_many_are_named_and_never_too_few() -> None:
    thinned = [view(5, 15, 3), view(3, 12, None)]
    assert holding([(2, 3)], thinned) == (5, 3)
    assert holding([(13, 14)], thinned) == (5,)
    gone = [view(5, 15, 4), view(4, 13, 3, to=1), view(3, 12, None)]
    assert holding([(2, 3)], gone) == (5, 4, 3)
