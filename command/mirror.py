"""`reverie mirror` and `reverie restore`: a copy of everything elsewhere, and the way back."""

from dataclasses import asdict
from typing import Annotated

import typer

from actors.home import DEFAULT_MODEL, default_home
from command.options import Json
from command.output import Output
from command.up import Clock


def mirror(
    destination: Annotated[str, typer.Argument(help="A directory, or host:path over ssh.")],
    model: Annotated[str, typer.Option(help="Which model of REVERIE_HOME.")] = DEFAULT_MODEL,
    is_json: Json = False,
) -> None:
    """Bring a copy of a model's state up to date, by rsync, while its cell runs or not."""
    from actors.mirror import mirror as ship

    output = Output(is_json)
    made = ship(default_home(), model, destination, Clock(is_json).say)
    told = f"generation {made.generation} (version {made.weights_version}) is mirrored and verified"
    output.show(asdict(made), told)


def restore(
    source: Annotated[str, typer.Argument(help="What 'reverie mirror' has made.")],
    is_json: Json = False,
) -> None:
    """Put a mirror's state into an empty REVERIE_HOME; 'reverie up' recovers from it."""
    from actors.mirror import restore as bring_back

    output = Output(is_json)
    made = bring_back(default_home(), source, Clock(is_json).say)
    told = f"generation {made.generation} of {made.model} is there; start it with its name as "
    output.show(asdict(made), told + "--model")
