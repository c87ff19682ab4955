"""Which generations have learned something, told from when it was learned.

    generation   1     2     3            4            5
    versions    0..4  ..9  ..12   a return to 1: 13  ..15      learned at 8: in 2 and 3

Where old generations were thinned out around a return, it may name more than have; never fewer.
"""

from collections.abc import Collection, Mapping, Sequence

from actors.messages import GenerationView

Span = tuple[int, int]
"""The steps of the versions after the first number, up to the second."""


def holding(spans: Collection[Span], generations: Sequence[GenerationView]) -> tuple[int, ...]:
    """Those of the generations whose weights have one of these steps in them, newest first."""
    known = {each.generation: each for each in generations}
    found = (number for number in known if _holds(spans, known, number))
    return tuple(sorted(found, reverse=True))


def _holds(
    spans: Collection[Span], known: Mapping[int, GenerationView], generation: int | None
) -> bool:
    while generation is not None:
        made = known[generation]
        came_from = made.parent if made.returns_to is None else made.returns_to
        before = None if came_from is None else known.get(came_from)
        begin = -1 if before is None else before.weights_version
        is_return = made.returns_to is not None and before is not None
        if not is_return and any(
            begin < until and after < made.weights_version for after, until in spans
        ):
            return True
        generation = None if before is None else before.generation
    return False
