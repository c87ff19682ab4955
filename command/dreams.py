"""`reverie dream`, `behaviours` and `memories`: what the model teaches itself, and from what."""

from pathlib import Path
from typing import Annotated, Final

import typer

from actors.errors import SettingsError
from command import dream_progress
from command.client import Refused, Server
from command.options import DEFAULT_PORT, Json, Port
from command.output import Output, plain, table, when

MEMORIES_AT_ONCE: Final = 200
"""So many of the longest fit into one body; all of a body are kept, or none."""
MEMORY_CHARS: Final = 100


def dream(
    rounds: Annotated[int, typer.Option(help="How many, one after another.")] = 1,
    behaviour: Annotated[
        str | None, typer.Option(help="Which one; drawn for each round if left out.")
    ] = None,
    port: Port = DEFAULT_PORT,
    is_json: Json = False,
) -> None:
    """Let a running cell dream, and show how it goes; Ctrl-C ends the showing only."""
    output, server = Output(is_json), Server(port)
    made = dream_progress.follow(server.ask, rounds, behaviour, output)
    output.show({"data": made})
    if any(each["state"] in ("failed", "taken back") for each in made):
        raise Refused("not every round passed; GET /dream/rounds/ID/report says why")


def behaviours(
    add: Annotated[
        str | None, typer.Option(help="Add one that ships with Reverie, by its name.")
    ] = None,
    port: Port = DEFAULT_PORT,
    is_json: Json = False,
) -> None:
    """The behaviours of a running cell and how far each is learned; those that ship with it."""
    from actors.dream import library

    output, server = Output(is_json), Server(port)
    shipped = {each.name: each for each in library.behaviours()}
    if add is not None:
        if add not in shipped:
            raise SettingsError(f"--add {add!r}: the library has {', '.join(shipped)}").about("add")
        server.ask("PUT", f"/behaviours/{add}", shipped[add].model_dump(exclude_defaults=True))
    there = server.get("/behaviours")["data"]
    left = [shipped[name] for name in sorted(shipped.keys() - {each["name"] for each in there})]
    made = table("behaviour", "standing", "fails", "instruction")
    for each in there:
        progress = each["progress"]
        failing = f"{progress['failure_rate']:.0%}"
        made.add_row(each["name"], progress["standing"], failing, plain(each["instruction"]))
    for one in left:
        made.add_row(f"[dim]{one.name}", "[dim]shipped", "", f"[dim]{plain(one.instruction)}")
    more = [one.model_dump(exclude_defaults=True) | {"name": one.name} for one in left]
    output.show({"data": there, "shipped": more}, made)


def memories(
    add: Annotated[
        Path | None, typer.Option(help="Add those of a folder of Markdown, or of JSONL.")
    ] = None,
    port: Port = DEFAULT_PORT,
    is_json: Json = False,
) -> None:
    """The newest memories of a running cell, which dreams are made from."""
    from actors.dream import memory

    output, server = Output(is_json), Server(port)
    if add is not None:
        found = [each.model_dump(exclude_defaults=True) for each in memory.read(add)]
        with output.steps() as progress:
            task = progress.add_task("memories", total=len(found), note="")
            for begin in range(0, len(found), MEMORIES_AT_ONCE):
                part = found[begin : begin + MEMORIES_AT_ONCE]
                server.post("/memories", {"memories": part})
                progress.advance(task, len(part))
        output.show({"num_kept": len(found)}, f"{len(found)} memories of {add} are kept")
        return
    kept = server.get("/memories")
    made = table("kept", "id", "tags", "begins")
    for each in kept["data"]:
        first = each["text"].splitlines()[0][:MEMORY_CHARS]
        tags = plain(" ".join(each["tags"]))
        made.add_row(when(each["created"]), plain(each["id"]), tags, plain(first))
    output.show(kept, made if kept["data"] else "no memories: 'reverie memories --add FOLDER'")
