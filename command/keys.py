"""`reverie keys`: who may use the model, and who may teach it."""

from collections.abc import Mapping
from typing import Annotated

import typer

from actors.errors import SettingsError
from actors.home import default_home
from command.options import Json
from command.output import Output, table, when

keys = typer.Typer(no_args_is_help=True, help="API keys; needed to serve on a public address.")


Limit = Annotated[int | None, typer.Option(help="Most of them; without limit if left out.")]
Change = Annotated[int | None, typer.Option(help="Most of them; as it was if left out.")]
KeyId = Annotated[str, typer.Argument(help="An id of 'reverie keys list'.")]


def _no_such_key(key_id: str) -> SettingsError:
    error = SettingsError(f"{key_id}: there is no key of this id; see 'reverie keys list'")
    return error.about("key_id")


def _in_words(quotas: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {num}" for name, num in quotas.items())


@keys.command("add")
def add(
    scope: Annotated[str, typer.Option(help="use (ask the model) or teach (also change it).")],
    requests_per_minute: Limit = None,
    ongoing: Limit = None,
    tokens_per_day: Limit = None,
    samples_per_day: Limit = None,
    expires_in_days: Annotated[float | None, typer.Option(help="Never if left out.")] = None,
    is_json: Json = False,
) -> None:
    """Make a key and print it: the only time it can be seen."""
    from door.keys import DAY_S, KeyStore, quotas_from

    output = Output(is_json)
    if scope not in ("use", "teach"):
        raise SettingsError(f"scope={scope!r}: choose use or teach").about("scope")
    quotas = quotas_from(
        requests_per_minute=requests_per_minute,
        ongoing=ongoing,
        tokens_per_day=tokens_per_day,
        samples_per_day=samples_per_day,
    )
    expires_in_s = None if expires_in_days is None else expires_in_days * DAY_S
    store = KeyStore(default_home())
    made = store.add("teach" if scope == "teach" else "use", quotas, expires_in_s)
    output.show({"key": made, "id": store.records()[-1]["id"], "scope": scope}, made)


@keys.command("list")
def list_(is_json: Json = False) -> None:
    """Ids, scopes and quotas; the keys themselves are stored as hashes."""
    from door.keys import KeyStore

    output = Output(is_json)
    records = KeyStore(default_home()).records()
    shown = [
        {name: each[name] for name in ("id", "scope", "created")}
        | {"quotas": each.get("quotas", {}), "expires": each.get("expires")}
        for each in records
    ]
    made = table("id", "scope", "made", "quotas", "expires")
    for each in shown:
        limits = _in_words(each["quotas"])
        ends = "" if each["expires"] is None else when(each["expires"])
        made.add_row(each["id"], each["scope"], when(each["created"]), limits, ends)
    output.show({"data": shown}, made if shown else "no keys: only this machine may use the door")


@keys.command("rotate")
def rotate(
    key_id: KeyId,
    overlap_hours: Annotated[
        float, typer.Option(help="So long the old key is taken, too; 0 ends it at once.")
    ] = 24,
    is_json: Json = False,
) -> None:
    """Make a new key for an id and print it; a running server takes it from its next request on."""
    from door.keys import KeyStore

    output = Output(is_json)
    made = KeyStore(default_home()).rotate(key_id, overlap_hours * 3600)
    if made is None:
        raise _no_such_key(key_id)
    output.show({"key": made, "id": key_id, "overlap_hours": overlap_hours}, made)


@keys.command("limit")
def limit(
    key_id: KeyId,
    requests_per_minute: Change = None,
    ongoing: Change = None,
    tokens_per_day: Change = None,
    samples_per_day: Change = None,
    unlimited: Annotated[
        list[str] | None, typer.Option(help="A quota to take away, say tokens_per_day.")
    ] = None,
    is_json: Json = False,
) -> None:
    """Change quotas from the next request on; what a day's quota counts, it counts from then."""
    from door.keys import KeyStore, Quotas

    output = Output(is_json)
    given = {
        "requests_per_minute": requests_per_minute,
        "ongoing": ongoing,
        "tokens_per_day": tokens_per_day,
        "samples_per_day": samples_per_day,
    }
    changes: dict[str, int | None] = {
        name: most for name, most in given.items() if most is not None
    }
    known = ", ".join(Quotas.model_fields)
    for name in (each.replace("-", "_") for each in unlimited or ()):
        if name not in Quotas.model_fields or name in changes:
            raise SettingsError(f"unlimited={name}: choose one of {known}, without a number").about(
                "unlimited"
            )
        changes[name] = None
    if not changes:
        raise SettingsError(
            "nothing to change: name a quota, or one to take away with --unlimited; "
            "'reverie keys list' shows them"
        )
    made = KeyStore(default_home()).limit(key_id, changes)
    if made is None:
        raise _no_such_key(key_id)
    has = made.model_dump(exclude_none=True)
    output.show({"id": key_id, "quotas": has}, f"{key_id}: {_in_words(has) or 'no quotas'}")


@keys.command("remove")
def remove(
    key_id: KeyId,
    is_json: Json = False,
) -> None:
    """Forget a key; a running server refuses it from its next request on."""
    from door.keys import KeyStore

    output = Output(is_json)
    if not KeyStore(default_home()).remove(key_id):
        raise _no_such_key(key_id)
    output.show({"id": key_id, "removed": True}, f"{key_id} is removed")
