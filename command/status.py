"""`reverie status`: the state of a running cell, as a few lines and a table."""

from collections.abc import Iterator
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table

from actors.home import MIB
from command.client import Server
from command.options import DEFAULT_PORT, Json, Port
from command.output import Output, loss_of, plain, table

ROLES: Final = ("cell", "engine", "trainer", "checkpoint", "dream", "ingress")
COLOURS: Final = {"ready": "green", "failed": "red"}


def status(port: Port = DEFAULT_PORT, is_json: Json = False) -> None:
    """The state of a running cell: versions, actors, memory, and what it learns."""
    output = Output(is_json)
    found = Server(port).get("/status")
    output.show(found, render(found))


def render(found: dict[str, Any]) -> RenderableType:
    """The answer of `/status`, for people; fields that are not there are left out."""
    colour = COLOURS.get(found["state"], "yellow")
    head = f"[bold]{plain(found.get('model') or 'no model yet')}[/]  [{colour}]{found['state']}[/]"
    if found.get("reason"):
        head += f"  {plain(found['reason'])}"
    return Group(head, "", _facts(found), "", _actors(found))


def _facts(found: dict[str, Any]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for name, value in _lines(found):
        grid.add_row(f"[dim]{name}[/]", value)
    return grid


def _lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    open_stages = [each for each in found.get("stages") or () if not each["is_done"]]
    if open_stages:
        yield "starting", f"{open_stages[-1]['name']}, {open_stages[-1]['seconds']:.0f} s"
    if found.get("weights_version") is not None:
        yield "weights", f"version {found['weights_version']}, epoch {found['epoch']}"
    kept = found.get("checkpoint")
    if kept:
        public = f"{kept['public_generation']} is public"
        yield "generation", f"{kept['generation']} (version {kept['weights_version']}); {public}"
        if kept.get("paused"):
            yield "", f"[yellow]nothing can be kept: {plain(kept['paused'])}[/]"
    if trainer := found.get("trainer"):
        yield "learning", _learning(trainer)
        if trainer.get("paused"):
            yield "", f"[yellow]waits: {plain(trainer['paused'])}[/]"
    if dream := found.get("dream"):
        yield "dreams", _dreaming(dream)
        if dream["proposed"] or dream["unscored"]:
            waiting = f"{dream['proposed']} wait for a decision, {dream['unscored']} not looked at"
            yield "candidates", waiting
    if ingress := found.get("ingress"):
        yield "requests", f"{ingress['ongoing_requests']} being answered"
    if found.get("restarts"):
        yield "restarts", str(found["restarts"])


def _learning(trainer: dict[str, Any]) -> str:
    told = f"{trainer['queued_samples']} samples wait" if trainer["queued_samples"] else "idle"
    if trainer.get("job_id"):
        told = f"{trainer['job_id']}, {trainer['queued_samples']} samples wait"
    if trainer.get("last_loss") is not None:
        told += (
            f"; last loss {loss_of(trainer['last_loss'])}, {trainer['last_step_s']:.2f} s a step"
        )
    return told


def _dreaming(dream: dict[str, Any]) -> str:
    told = str(dream["state"])
    if dream.get("round_id"):
        told += f", {dream['round_id']} of {dream['behaviour']}"
        told += f": {dream['stage']} {dream['done']} of {dream['total']}"
    if dream.get("asked"):
        told += f"; {dream['asked']} rounds asked for"
    return told


def _actors(found: dict[str, Any]) -> Table:
    made = table("actor", "#pid", "#MiB", "of that")
    for role in ROLES:
        actor = found.get(role)
        if not actor:
            made.add_row(role, "-", "", "[yellow]not there[/]")
            continue
        pids = [actor["pid"], *actor.get("child_pids", ())]
        more = f" +{len(pids) - 1}" if len(pids) > 1 else ""
        made.add_row(role, f"{actor['pid']}{more}", _resident(pids), _of_that(role, actor))
    return made


def _of_that(role: str, actor: dict[str, Any]) -> str:
    if role == "trainer" and actor.get("weights_bytes"):
        return (
            f"{actor['weights_bytes'] / MIB:.0f} weights, shared with the engine; "
            f"{actor['state_bytes'] / MIB:.0f} optimizer"
        )
    if role == "engine" and actor.get("vllm_version"):
        return f"vLLM {actor['vllm_version']}, contexts of {actor['max_model_len']} tokens"
    return ""


def _resident(pids: list[int]) -> str:
    """Resident memory of the processes, if they are of this machine."""
    import psutil

    try:
        return f"{sum(psutil.Process(pid).memory_info().rss for pid in pids) / MIB:.0f}"
    except psutil.Error:
        return ""
