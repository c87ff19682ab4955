"""The table and the plot of `internalise.py`."""

from pathlib import Path
from statistics import fmean
from typing import Any


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


def _last_measured(each: dict[str, Any]) -> dict[str, float]:
    """The newest measurement of what stayed in the weights."""
    for made in reversed(each["rounds"]):
        if made["state"] == "passed":
            return dict(made["attempts"][-1]["measured"])
    return dict(each["rounds"][0]["before"] or {})


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Success after each behaviour, and KL after each round, by variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    full = [each for each in runs if each["variant"] == "full"]
    if full:
        names = [name for name in full[0]["tests"][0] if name != "after"]
        places = range(len(full[0]["tests"]))
        for name in names:
            shares = [[100 * test[name] for test in each["tests"]] for each in full]
            (line,) = left.plot(places, [fmean(at) for at in zip(*shares, strict=True)], label=name)
            for of_a_seed in shares:
                left.plot(places, of_a_seed, "o", color=line.get_color(), alpha=0.4)
        labels = ["before"] + [f"after\n{test['after']}" for test in full[0]["tests"][1:]]
        left.set_xticks(list(places), labels, fontsize=8)
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
    figure.savefig(path, dpi=130)
