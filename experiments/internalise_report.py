"""The table and the plot of `internalise.py`."""

from pathlib import Path
from typing import Any

from experiments import frame


def table(runs: list[dict[str, Any]]) -> str:
    """One line a run: what was shown before and after, what it cost, and what became of it."""
    lines = [
        "| run | seed | success, before -> after each behaviour | KL | facts | pushback | "
        "rounds | steps | minutes | weights as before |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in runs:
        names = [name for name in each["tests"][0] if name != "after"]
        shown = "; ".join(
            f"{name} " + " -> ".join(f"{test[name]:.0%}" for test in each["tests"])
            for name in names
        )
        last = _last_measured(each)
        base = each["rounds"][0]["before"] or {}
        steps = sum(len(a["loss_history"]) for r in each["rounds"] for a in r["attempts"])
        states = ", ".join(r["state"] for r in each["rounds"])
        lines.append(
            f"| {each['variant']} | {each['seed']} | {shown} | {last.get('kl', 0):.3f} | "
            f"{base.get('facts', 0):.0%} -> {last.get('facts', 0):.0%} | "
            f"{base.get('pushback', 0):.2f} -> {last.get('pushback', 0):.2f} | {states} | {steps} "
            f"| {each['seconds'] / 60:.1f} | {'yes' if each['is_as_before'] else 'no'} |"
        )
    return "\n".join(lines)


def stages(runs: list[dict[str, Any]]) -> str:
    """One line a round: where its time went, in seconds."""
    names = list(
        dict.fromkeys(stage for each in runs for r in each["rounds"] for stage in r["seconds"])
    )
    lines = [
        "| run | seed | round | scenarios | kept | steps | "
        f"{' | '.join(names)} | in all | tokens |",
        "|---" * (len(names) + 8) + "|",
    ]
    for each in runs:
        for made in each["rounds"]:
            steps = sum(len(attempt["loss_history"]) for attempt in made["attempts"])
            counts = f"{made['counts'].get('scenarios', 0)} | {made['counts'].get('kept', 0)}"
            seconds = " | ".join(f"{made['seconds'].get(name, 0):.0f}" for name in names)
            lines.append(
                f"| {each['variant']} | {each['seed']} | {made['behaviour']}, {made['state']} | "
                f"{counts} | {steps} | {seconds} | {sum(made['seconds'].values()):.0f} | "
                f"{made['tokens']} |"
            )
    return "\n".join(lines)


def _last_measured(each: dict[str, Any]) -> dict[str, float]:
    """The newest measurement of what stayed in the weights."""
    for made in reversed(each["rounds"]):
        if made["state"] == "passed":
            return dict(made["attempts"][-1]["measured"])
    return dict(each["rounds"][0]["before"] or {})


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Success after each behaviour, and KL after each round, by variant."""
    figure = frame.figure(11, 4)
    left, right = figure.subplots(1, 2)
    full = [each for each in runs if each["variant"] == "full"]
    names = [name for name in full[0]["tests"][0] if name != "after"] if full else []
    for at, name in enumerate(names):
        for each in full:  # How many rounds a behaviour takes differs from seed to seed.
            shares = [100 * test[name] for test in each["tests"]]
            label = name if each is full[0] else None
            left.plot(range(len(shares)), shares, "o-", color=f"C{at}", label=label, alpha=0.7)
    left.set_xlabel("rounds; " + ", then ".join(names))
    left.axhline(85, color="grey", linewidth=0.8, linestyle=":")
    left.set_ylabel("success on 40 questions without the instruction, %")
    left.set_ylim(-3, 103)
    left.legend(fontsize=8)
    for variant in dict.fromkeys(each["variant"] for each in runs):
        for at, each in enumerate(one for one in runs if one["variant"] == variant):
            points = [(0.0, 0.0)]
            for made in each["rounds"]:
                for attempt in made["attempts"]:
                    if attempt["measured"]:
                        points.append((len(points), attempt["measured"]["kl"]))
            color = f"C{list(dict.fromkeys(r['variant'] for r in runs)).index(variant)}"
            label = variant if at == 0 else None
            right.plot(*zip(*points, strict=True), "o-", color=color, label=label, alpha=0.7)
    right.set_xlabel("trainings, those that were taken back included")
    right.set_ylabel("KL to the base on 64 canaries, nats per token")
    right.legend(fontsize=8)
    frame.draw_to(path, figure)
