"""How well the served model judges: its verdicts against 60 answers that a person has labelled.

    .venv/bin/python -m experiments.judge_agreement
    RAY_AUTH_MODE=token ray job submit --working-dir . -- python -m experiments.judge_agreement

The answers (`judge_labels.json`) are what the default model wrote in dreams, the labels say whether
an answer answers its question, truly as far as common sense can tell. The judge asks twice, with
the options swapped, and says yes only if both do; each order alone is shown beside it. Agreement
alone flatters who always says no: balanced accuracy is the mean of what is found of the good and of
the bad, 50 % by chance, and kappa is the agreement beyond chance (J. Cohen, 1960).
"""

import asyncio
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import httpx

from actors.dream import library
from actors.dream.behaviour import Behaviour
from actors.dream.judge import Verdict, judge
from actors.dream.model import TIMEOUT_S, EngineModel
from apollo.weights.adopt import adopt
from experiments import frame
from experiments.cells import running_cell

LABELS: Final = Path(__file__).with_name("judge_labels.json")
ASKED: Final = Behaviour(
    name="to-the-point",
    instruction="Answer what is asked, truly.",
    rubric="The answer is about the question and true.",
)


async def verdicts(base: str, labels: Sequence[dict[str, Any]]) -> list[Verdict]:
    """One for each label, from a running server."""
    async with httpx.AsyncClient(base_url=base, timeout=TIMEOUT_S) as client:
        name = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        model = EngineModel(client, name)
        examples = library.judge_examples()
        asked = [judge(model, ASKED, row["question"], row["answer"], examples) for row in labels]
        return list(await asyncio.gather(*asked))


def table(labels: Sequence[dict[str, Any]], found: Sequence[Verdict]) -> str:
    """Agreement of each way to ask."""
    ways = {
        "both orders say yes (the judge)": [each.is_good for each in found],
        "yes first": [each.margins[0] > 0 for each in found],
        "no first": [each.margins[1] > 0 for each in found],
        "mean of both margins": [sum(each.margins) > 0 for each in found],
        "always no": [False for _ in found],
    }
    good = [bool(row["is_good"]) for row in labels]
    lines = [
        "| verdict | says yes | agrees | good ones found | bad ones found | balanced | kappa |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, says in ways.items():
        pairs = list(zip(good, says, strict=True))
        agreed = sum(one == other for one, other in pairs) / len(pairs)
        of_good = sum(said for is_good, said in pairs if is_good) / sum(good)
        of_bad = sum(not said for is_good, said in pairs if not is_good) / (len(good) - sum(good))
        yes, share = sum(says) / len(says), sum(good) / len(good)
        chance = yes * share + (1 - yes) * (1 - share)
        lines.append(
            f"| {name} | {yes:.0%} | {agreed:.0%} | {of_good:.0%} | {of_bad:.0%} | "
            f"{(of_good + of_bad) / 2:.0%} | {(agreed - chance) / (1 - chance):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument("--json", type=Path, help="write the summary here")
    parser.add_argument("--url", help="a running server; else one is started for this")
    options = frame.begin(parser)
    labels = json.loads(LABELS.read_text())
    if options.url:
        found = asyncio.run(verdicts(options.url, labels))
    else:
        with tempfile.TemporaryDirectory(prefix="reverie-judge-") as home:
            directory = adopt("smollm2-135m", Path(home), "float32", print).directory
            with running_cell(directory, {}) as base:
                found = asyncio.run(verdicts(base, labels))
    print(f"{len(labels)} answers, {sum(row['is_good'] for row in labels)} of them good")
    print(table(labels, found))
    frame.keep(options.json, options, {"labels": labels, "verdicts": found})


if __name__ == "__main__":
    main()
