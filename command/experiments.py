"""Which experiments there are, and what each of them takes: read from their source, not imported.

An experiment is a script in `experiments/` with arguments of its own. Importing one would import
torch; so what it takes is read from its calls of `add_argument`.
"""

import ast
import difflib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from actors.errors import SettingsError

FOLDER: Final = "experiments"
LOCAL_DOOR: Final = "http://127.0.0.1:8000"
"""What experiments take for the door's address, if nobody says another."""


@dataclass(frozen=True)
class Option:
    """One argument of an experiment."""

    name: str
    help: str
    default: Any
    takes_value: bool
    takes_several: bool


@dataclass(frozen=True)
class Experiment:
    """One script."""

    name: str
    about: str
    options: dict[str, Option]

    def arguments(self, settings: dict[str, str]) -> list[str]:
        """Its command line; raises SettingsError that names the key, the value and the remedy."""
        made: list[str] = []
        for key, value in settings.items():
            option = self.options.get(key)
            if option is None:
                near = difflib.get_close_matches(key, self.options, 1)
                hint = f"did you mean {near[0]}?" if near else "it has none like it"
                raise SettingsError(
                    f"{key}={value}: {self.name} takes {', '.join(self.options)}; {hint}"
                ).about(key)
            flag = f"--{option.name}"
            if not option.takes_value:
                if value not in ("true", "false"):
                    raise SettingsError(f"{key}={value}: it is true or false").about(key)
                made += [flag] if value == "true" else []
            elif option.takes_several:
                made += [flag, *shlex.split(value)]
            else:
                made.append(f"{flag}={value}")
        return made

    def defaults(self, home: Path, base: str) -> dict[str, str]:
        """What is filled in where nobody says otherwise: this cell, files to be collected."""
        made: dict[str, str] = {}
        for name, option in self.options.items():
            if option.default == LOCAL_DOOR:
                made[name] = base
            elif name == "home" and option.default == "~/.reverie":
                made[name] = str(home)
            elif name == "json" and option.default is None:
                made[name] = f"{self.name}.json"
            elif name == "plot" and option.default is None:
                made[name] = f"{self.name}.png"
        return made


def root() -> Path:
    """The checkout that this command runs from; raises SettingsError if it is none."""
    found = Path(__file__).parents[1]
    if not (found / FOLDER).is_dir():
        raise SettingsError(
            f"{found} has no {FOLDER}/: experiments are run from a checkout of the repository"
        )
    return found


def names() -> list[str]:
    """Those that can be submitted."""
    try:
        place = root() / FOLDER
    except SettingsError:
        return []
    return sorted(path.stem for path in place.glob("*.py") if "__main__" in path.read_text())


def find(name: str) -> Experiment:
    """Raises SettingsError for an unknown one."""
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise SettingsError(f"{name}: there is no such experiment; {hint}").about("name")
    tree = ast.parse((root() / FOLDER / f"{name}.py").read_text())
    about = (ast.get_docstring(tree) or "").split("\n")[0]
    return Experiment(name, about, dict(map(_option, _calls(tree))))


def _calls(tree: ast.AST) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "add_argument"
        and node.args
        and str(_constant(node.args[0])).startswith("--")
    ]


def _option(call: ast.Call) -> tuple[str, Option]:
    given = {word.arg: word.value for word in call.keywords}
    name = str(_constant(call.args[0])).removeprefix("--")
    action = _constant(given.get("action"))
    nargs = _constant(given.get("nargs"))
    return name, Option(
        name=name,
        help=str(_constant(given.get("help")) or ""),
        default=_constant(given.get("default")),
        takes_value=action not in ("store_true", "store_false"),
        takes_several=nargs is not None,
    )


def _constant(node: ast.expr | None) -> Any:
    """A constant's value; of anything else its source."""
    if node is None:
        return None
    return node.value if isinstance(node, ast.Constant) else ast.unparse(node)
