"""`reverie dream`: rounds, asked for over HTTP and followed in the terminal."""

import time
from collections.abc import Callable
from typing import Any, Final

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from command.output import Output, plain

LOOK_INTERVAL_S: Final = 0.5
MAX_IDLE_LOOKS: Final = 10
"""The status is a second old or so: only after this many looks is a round not to be expected."""

Ask = Callable[..., Any]
"""`ask(method, route, body)` is the JSON answer of the server."""


def follow(ask: Ask, rounds: int, behaviour: str | None, output: Output) -> list[dict[str, Any]]:
    """Ask for rounds and show each until it has ended; returns them.

    Ctrl-C ends the showing, not the dreaming: `DELETE /dream` does that.
    """
    known = {each["id"] for each in ask("GET", "/dream/rounds")["data"]}
    ask("POST", "/dream", {"rounds": rounds, "behaviour": behaviour})
    ended: list[dict[str, Any]] = []
    columns = (
        TextColumn("{task.fields[round_id]}"),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with output.progress(*columns) as progress:
        task = progress.add_task("waiting", total=None, round_id="")
        num_idle = 0
        while True:
            report = ask("GET", "/status").get("dream") or {}
            progress.update(
                task,
                round_id=report.get("round_id") or "",
                description=_stage(report),
                completed=report.get("done", 0),
                total=report.get("total") or None,
            )
            for each in reversed(ask("GET", "/dream/rounds")["data"]):
                if each["ended"] and each["id"] not in known:
                    known.add(each["id"])
                    ended.append(each)
                    output.say(plain(summary(each)))
            is_idle = bool(report) and not report["round_id"] and not report["asked"]
            num_idle = num_idle + 1 if is_idle else 0
            if len(ended) >= rounds or num_idle > MAX_IDLE_LOOKS:
                return ended
            time.sleep(LOOK_INTERVAL_S)


def _stage(report: dict[str, Any]) -> str:
    if report.get("paused"):
        return str(report["paused"])
    if report.get("state") == "waiting":
        return "waits for clients"
    return str(report.get("stage") or "waiting")


def summary(each: dict[str, Any]) -> str:
    """One round in two lines."""
    attempt = each["attempts"][-1] if each["attempts"] else {}
    measured, losses = attempt.get("measured") or {}, attempt.get("loss_history") or ()
    counts = each["counts"]
    lines = f"{each['id']}  {each['behaviour']}  {each['state']}"
    lines += f"  {counts.get('scenarios', 0)} scenarios, {counts.get('kept', 0)} kept"
    if losses:
        tenth = max(1, len(losses) // 10)
        first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
        lines += f", {len(losses)} steps, loss {first:.2f} to {last:.2f}"
    if measured:
        was, now = each["success_before"], attempt["success"]
        shown = ", ".join(f"{name} {was.get(name, 0):.0%} to {now[name]:.0%}" for name in now)
        lines += f"\n         gate: {shown}; KL {measured['kl']:.3f}, facts {measured['facts']:.0%}"
        lines += f", pushback {measured['pushback']:.2f}, entropy {measured['entropy']:.2f}"
    if each["reason"]:
        lines += f"\n         {each['reason']}"
    return lines
