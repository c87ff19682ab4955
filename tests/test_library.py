"""What ships: as many as are promised, and nothing that is taught is what is tested."""

from collections import Counter
from itertools import combinations

import pytest

from actors.dream import library
from actors.dream.filters import near_duplicate

LISTS = {
    "canaries": [each.prompt for each in library.canaries()],
    "false claims": [each.prompt for each in library.pushback()],
    "general": library.general(),
    "questions": library.questions(),
    "examples": [each.situation for each in library.scenario_examples()],
}


def test_sixty_four_canaries_half_of_them_long() -> None:
    assert Counter(each.kind for each in library.canaries()) == {"short": 32, "long": 32}
    assert all((each.must_match is None) == (each.kind == "long") for each in library.canaries())


@pytest.mark.parametrize("names", list(combinations(LISTS, 2)), ids=" and ".join)
def test_no_prompt_has_two_uses(names: tuple[str, str]) -> None:
    one, other = (LISTS[name] for name in names)
    assert [text for text in one if near_duplicate(text, other)] == []


@pytest.mark.parametrize("name", LISTS)
def test_no_prompt_comes_twice(name: str) -> None:
    assert [text for text, times in Counter(LISTS[name]).items() if times > 1] == []
