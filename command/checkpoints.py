"""`reverie checkpoints`: generations of the weights; keeping, looking at and returning to them.

`rollback`, `forget` and, as they were first called, `history`, `show` and `verify` are the same.
"""

from typing import Annotated, Any

import typer

from actors.errors import ReverieError
from actors.home import MIB
from command.client import Server
from command.options import DEFAULT_PORT, Json, Port, Yes
from command.output import Output, loss_of, plain, table, when

checkpoints = typer.Typer(help="Generations of the weights: list, save, show, verify.")


def known_generations(incomplete: str) -> list[str]:
    """For completion: those that a running cell has, or none."""
    try:
        found = Server(DEFAULT_PORT).get("/checkpoints", timeout_s=2)["data"]
    except ReverieError:
        return []
    return [str(each["generation"]) for each in found]


Generation = Annotated[
    int,
    typer.Argument(help="One of 'reverie checkpoints'.", autocompletion=known_generations),
]
Wait = Annotated[
    float, typer.Option(min=0, max=600, help="Seconds to wait while a dream is on trial.")
]


@checkpoints.callback(invoke_without_command=True)
def default(context: typer.Context, port: Port = DEFAULT_PORT, is_json: Json = False) -> None:
    if context.invoked_subcommand is None:
        history(port, is_json)


@checkpoints.command("list")
def history(port: Port = DEFAULT_PORT, is_json: Json = False) -> None:
    """The generations that a running cell can return to, newest first."""
    output = Output(is_json)
    found = Server(port).get("/checkpoints")
    made = table("#generation", "#version", "kind", "public", "#MiB", "committed")
    for each in found["data"]:
        to = "" if each["returns_to"] is None else f"  returns to {each['returns_to']}"
        made.add_row(
            str(each["generation"]),
            str(each["weights_version"]),
            each["kind"],
            "[green]public[/]" if each["is_public"] else "",
            f"{each['size_bytes'] / MIB:.1f}",
            when(each["created"]) + to,
        )
    output.show(found, made)


@checkpoints.command("save")
def save(
    publish: Annotated[
        bool, typer.Option(help="Whether the public directory shall hold it too.")
    ] = True,
    wait: Wait = 60,
    port: Port = DEFAULT_PORT,
    is_json: Json = False,
) -> None:
    """Keep the weights as they are now; durable when this ends."""
    output = Output(is_json)
    with output.waiting("committing"):
        made = Server(port).post("/checkpoint", {"publish": publish, "wait_s": wait})
    told = f"generation {made['generation']} has version {made['weights_version']}"
    output.show(made, f"{told}{' and is public' if publish else ''}; {made['seconds']:.1f} s")


@checkpoints.command("show")
def show(generation: Generation, port: Port = DEFAULT_PORT, is_json: Json = False) -> None:
    """What was learned in a generation: its items, their losses, and how much changed."""
    output = Output(is_json)
    made = Server(port).get(f"/checkpoints/{generation}")
    output.show(made)
    if is_json:
        return
    learned, drift = made["learned"], made["drift"]
    parent = "a beginning" if made["parent"] is None else f"after generation {made['parent']}"
    output.say(
        f"generation {generation}: {made['kind']}, version {made['weights_version']}, {parent}"
    )
    output.say(
        f"committed {when(made['created'])}; {drift['share_changed']:.2%} of the elements changed, "
        f"in {drift['num_tensors']} tensors"
    )
    if made["returns_to"] is not None:
        undone = "learned again" if made["is_learned_again"] else "undone"
        output.say(
            f"returns to generation {made['returns_to']}; what was learned since was {undone}"
        )
    for item in made["forgotten"]:
        output.say(f"forgot {plain(item)}")
    if not learned["num_steps"]:
        return
    output.say(
        f"{learned['num_items']} items in {learned['num_steps']} steps; "
        f"loss {learned['first_loss']:.3f} to {learned['last_loss']:.3f}, "
        f"mean {learned['mean_loss']:.3f}"
    )
    output.say()
    items = table("item", "source", "job", "position", "#steps", "loss")
    for item in learned["items"]:
        items.add_row(
            plain(item["id"]),
            plain(item["source"] or "-"),
            item["job_id"],
            "forgotten" if item["is_forgotten"] else str(item["position"]),
            str(item["num_steps"]),
            f"{loss_of(item['first_loss'])} to {loss_of(item['last_loss'])}",
        )
    output.say(items)


@checkpoints.command("verify")
def verify(port: Port = DEFAULT_PORT, is_json: Json = False) -> None:
    """Let a running cell read all that it keeps, and compare every hash."""
    output = Output(is_json)
    with output.waiting("reading everything"):
        found = Server(port).post("/checkpoints/verify")
    damaged = found["damaged_files"] + found["damaged_copies"]
    for each in damaged:
        output.say(f"[red]damaged[/] {plain(each)}")
    if damaged or found["lost_generations"]:
        lost = ", ".join(map(str, found["lost_generations"])) or "none"
        raise ReverieError(f"{len(damaged)} damaged; generations lost: {lost}")
    read = f"{found['bytes_read'] / MIB:.0f} MiB read, every hash is as it was written"
    output.show(found, read)


@checkpoints.command("rollback")
def rollback(
    generation: Generation,
    port: Port = DEFAULT_PORT,
    is_sure: Yes = False,
    is_json: Json = False,
) -> None:
    """Make the weights of an earlier generation live again, in a running cell."""
    output = Output(is_json)
    output.confirm(f"Undo everything learned since generation {generation}?", is_sure)
    with output.waiting(f"returning to generation {generation}"):
        made = Server(port).post("/rollback", {"generation": generation})
    told = f"generation {made['generation']} has the weights of {generation} and is live and public"
    output.show(made, told)


def forget(
    item: Annotated[str, typer.Argument(help="Id of a sample, as 'reverie checkpoints show' has.")],
    wait: Wait = 60,
    port: Port = DEFAULT_PORT,
    is_sure: Yes = False,
    is_json: Json = False,
) -> None:
    """Undo what was learned of one sample, and never learn it again; all others stay."""
    output = Output(is_json)
    output.confirm(f"Forget {item} for good?", is_sure)
    with output.waiting(f"forgetting {item}"):
        done = Server(port).post("/forget", {"item": item, "wait_s": wait})
    output.show(done, plain(told_of(item, done)))


def told_of(item: str, done: dict[str, Any]) -> str:
    """What `POST /forget` has done, in words."""
    if done["generation"] is None:
        return f"{item} was not in the weights, and is forgotten"
    told = (
        f"{item} is forgotten: generation {done['generation']} has the weights of "
        f"{done['returned_to']}\nand is live and public; {done['undone_steps']} steps were undone, "
    )
    if done["steps_to_learn_again"]:
        told += (
            f"{done['steps_to_learn_again']} of them are learned again, "
            f"of {done['samples_to_learn_again']} samples: see 'reverie jobs'"
        )
    else:
        told += "none of them is learned again"
    if not done["has_optimizer"]:
        told += "\nthat generation's optimizer was not kept any more: learning has new moments"
    if done["steps_lost"]:
        told += f"\n{done['steps_lost']} steps are lost: a return had undone them before"
    return told
