"""`reverie keys`: who may use the model, and who may teach it."""

from typing import Annotated

import typer

from actors.errors import SettingsError
from actors.home import default_home
from command.options import Json
from command.output import Output, table, when

keys = typer.Typer(no_args_is_help=True, help="API keys; needed to serve on a public address.")


@keys.command("add")
def add(
    scope: Annotated[str, typer.Option(help="use (ask the model) or teach (also change it).")],
    is_json: Json = False,
) -> None:
    """Make a key and print it: the only time it can be seen."""
    from door.keys import KeyStore

    output = Output(is_json)
    if scope not in ("use", "teach"):
        raise SettingsError(f"scope={scope!r}: choose use or teach").about("scope")
    store = KeyStore(default_home())
    made = store.add("teach" if scope == "teach" else "use")
    output.show({"key": made, "id": store.records()[-1]["id"], "scope": scope}, made)


@keys.command("list")
def list_(is_json: Json = False) -> None:
    """Ids and scopes; the keys themselves are stored as hashes."""
    from door.keys import KeyStore

    output = Output(is_json)
    records = KeyStore(default_home()).records()
    shown = [{name: each[name] for name in ("id", "scope", "created")} for each in records]
    made = table("id", "scope", "made")
    for each in shown:
        made.add_row(each["id"], each["scope"], when(each["created"]))
    output.show({"data": shown}, made if shown else "no keys: only this machine may use the door")


@keys.command("remove")
def remove(
    key_id: Annotated[str, typer.Argument(help="An id of 'reverie keys list'.")],
    is_json: Json = False,
) -> None:
    """Forget a key; a running server refuses it from its next request on."""
    from door.keys import KeyStore

    output = Output(is_json)
    if not KeyStore(default_home()).remove(key_id):
        raise SettingsError(f"{key_id}: there is no key of this id; see 'reverie keys list'").about(
            "key_id"
        )
    output.show({"id": key_id, "removed": True}, f"{key_id} is removed")
