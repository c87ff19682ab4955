"""Commands of `reverie` that ask a running server, over HTTP, as any client does."""

import json
import os
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from actors.errors import SettingsError
from actors.settings import MIB

ANSWER_TIMEOUT_S: Final = 10
WORK_TIMEOUT_S: Final = 900
MEMORIES_AT_ONCE: Final = 200
"""So many of the longest fit into one body; all of a body are kept, or none."""

Port = Annotated[int, typer.Option(help="Port of the door, on 127.0.0.1.")]


def status(port: Port = 8000) -> None:
    """The state of a running cell, as JSON."""
    print(json.dumps(_ask(port, "GET", "/status"), indent=2))


def history(port: Port = 8000) -> None:
    """The generations that a running cell can return to, newest first."""
    print("generation  version  kind      public    MiB  committed")
    for each in _ask(port, "GET", "/checkpoints")["data"]:
        when = datetime.fromtimestamp(each["created"]).isoformat(" ", "seconds")
        to = "" if each["returns_to"] is None else f"  returns to {each['returns_to']}"
        public = "public" if each["is_public"] else ""
        print(
            f"{each['generation']:10}  {each['weights_version']:7}  {each['kind']:8}  {public:6}  "
            f"{each['size_bytes'] / MIB:5.1f}  {when}{to}"
        )


def rollback(
    generation: Annotated[int, typer.Argument(help="One of 'reverie history'.")], port: Port = 8000
) -> None:
    """Make the weights of an earlier generation live again, in a running cell."""
    made = _ask(port, "POST", "/rollback", {"generation": generation})
    print(f"generation {made['generation']} has the weights of {generation} and is live and public")


def show(
    generation: Annotated[int, typer.Argument(help="One of 'reverie history'.")], port: Port = 8000
) -> None:
    """What was learned in a generation: its items, their losses, and how much changed."""
    made = _ask(port, "GET", f"/checkpoints/{generation}")
    learned, drift = made["learned"], made["drift"]
    when = datetime.fromtimestamp(made["created"]).isoformat(" ", "seconds")
    parent = "a beginning" if made["parent"] is None else f"after generation {made['parent']}"
    print(f"generation {generation}: {made['kind']}, version {made['weights_version']}, {parent}")
    print(f"committed {when}; {drift['share_changed']:.2%} of the elements changed", end="")
    print(f", in {drift['num_tensors']} tensors")
    if made["returns_to"] is not None:
        undone = "learned again" if made["is_learned_again"] else "undone"
        print(f"returns to generation {made['returns_to']}; what was learned since was {undone}")
    for item in made["forgotten"]:
        print(f"forgot {item}")
    if not learned["num_steps"]:
        return
    print(f"{learned['num_items']} items in {learned['num_steps']} steps; loss", end=" ")
    print(f"{learned['first_loss']:.3f} to {learned['last_loss']:.3f}", end=", ")
    print(f"mean {learned['mean_loss']:.3f}\nitem  source  job  position  steps  loss")
    for item in learned["items"]:
        place = "forgotten" if item["is_forgotten"] else item["position"]
        print(
            f"{item['id']}  {item['source'] or '-'}  {item['job_id']}  {place}  "
            f"{item['num_steps']}  {item['first_loss']:.3f} to {item['last_loss']:.3f}"
        )


def forget(
    item: Annotated[str, typer.Argument(help="Id of a sample, as 'reverie show' lists them.")],
    port: Port = 8000,
) -> None:
    """Undo what was learned of one sample, and never learn it again; all others stay."""
    done = _ask(port, "POST", "/forget", {"item": item})
    if done["generation"] is None:
        print(f"{item} was not in the weights, and is forgotten")
        return
    print(f"{item} is forgotten: generation {done['generation']} has the weights of", end=" ")
    print(f"{done['returned_to']} and is live and public; {done['undone_steps']} steps were undone")
    print(f"{done['steps_to_learn_again']} of them are learned again, of", end=" ")
    print(f"{done['samples_to_learn_again']} samples: see /train/jobs")
    if not done["has_optimizer"]:
        print("that generation's optimizer was not kept any more: learning has new moments")
    if done["steps_lost"]:
        print(f"{done['steps_lost']} steps are lost: a return had undone them before")


def verify(port: Port = 8000) -> None:
    """Let a running cell read all that it keeps, and compare every hash."""
    found = _ask(port, "POST", "/checkpoints/verify")
    damaged = found["damaged_files"] + found["damaged_copies"]
    for each in damaged:
        print(f"damaged: {each}")
    if damaged or found["lost_generations"]:
        lost = ", ".join(map(str, found["lost_generations"])) or "none"
        raise SettingsError(f"{len(damaged)} damaged; generations lost: {lost}")
    print(f"{found['bytes_read'] / MIB:.0f} MiB read, every hash is as it was written")


def dream(
    rounds: Annotated[int, typer.Option(help="How many, one after another.")] = 1,
    behaviour: Annotated[
        str | None, typer.Option(help="Which one; drawn for each round if left out.")
    ] = None,
    port: Port = 8000,
) -> None:
    """Let a running cell dream, and show how it goes."""
    from rich.console import Console

    from actors.dream.command import follow

    made = follow(partial(_ask, port), rounds, behaviour, Console(highlight=False))
    if any(each["state"] in ("failed", "taken back") for each in made):
        raise SettingsError("not every round passed; GET /dream/rounds/ID/report says why")


def behaviours(
    add: Annotated[
        str | None, typer.Option(help="Add one that ships with Reverie, by its name.")
    ] = None,
    port: Port = 8000,
) -> None:
    """The behaviours of a running cell and how far each is learned; those that ship with it."""
    from actors.dream import library

    shipped = {each.name: each for each in library.behaviours()}
    if add is not None:
        if add not in shipped:
            raise SettingsError(f"--add {add!r}: the library has {', '.join(shipped)}")
        _ask(port, "PUT", f"/behaviours/{add}", shipped[add].model_dump(exclude_defaults=True))
    there = _ask(port, "GET", "/behaviours")["data"]
    for each in there:
        progress = each["progress"]
        failing = f"fails {progress['failure_rate']:.0%}"
        print(f"{each['name']:24} {progress['standing']:9} {failing:11} {each['instruction']}")
    for name in shipped.keys() - {each["name"] for each in there}:
        print(f"{name:24} {'shipped':9} {'':11} {shipped[name].instruction}")


def memories(
    add: Annotated[
        Path | None, typer.Option(help="Add those of a folder of Markdown, or of JSONL.")
    ] = None,
    port: Port = 8000,
) -> None:
    """The newest memories of a running cell, which dreams are made from."""
    from actors.dream import memory

    if add is not None:
        found = [each.model_dump(exclude_defaults=True) for each in memory.read(add)]
        for begin in range(0, len(found), MEMORIES_AT_ONCE):
            part = found[begin : begin + MEMORIES_AT_ONCE]
            _ask(port, "POST", "/memories", {"memories": part})
        print(f"{len(found)} memories of {add} are kept")
        return
    for each in _ask(port, "GET", "/memories")["data"]:
        when = datetime.fromtimestamp(each["created"]).isoformat(" ", "minutes")
        tags = "".join(f" #{tag}" for tag in each["tags"])
        print(f"{when}  {each['id']}{tags}  {each['text'].splitlines()[0][:100]}")


def _ask(port: int, method: str, route: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON answer of a running cell; raises SettingsError with its words, or without one."""
    import httpx

    key = os.environ.get("REVERIE_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    timeout_s = ANSWER_TIMEOUT_S if method == "GET" else WORK_TIMEOUT_S
    try:
        url = f"http://127.0.0.1:{port}{route}"
        answer = httpx.request(method, url, headers=headers, json=body, timeout=timeout_s)
    except httpx.HTTPError:
        raise SettingsError(
            f"port={port}: no server answers; start one with 'make serve'"
        ) from None
    if answer.is_error and route != "/status":
        raise SettingsError(answer.json()["error"]["message"])
    return answer.json()


COMMANDS: Final = (
    status,
    history,
    show,
    rollback,
    forget,
    verify,
    dream,
    behaviours,
    memories,
)
