"""How many examples a behaviour needs until prompts that were never learned show it.

    .venv/bin/python -m experiments.examples_to_effect --plot docs/examples_to_effect.png
    .venv/bin/python -m experiments.examples_to_effect --steps 20 --counts 1 2 5 10 20
    RAY_AUTH_MODE=token ray job submit --working-dir . -- \\
        python -m experiments.examples_to_effect --out /tmp/runs.jsonl

The behaviour is one that a rule can judge: an answer about cooking begins with "Kitchen note:". An
example is a question about cooking, an instruction that asks for this, and the base model's own
answer behind the opening; the instruction is stripped, so that it must move into the weights. After
1, 2, 5, 10, 20 and 50 such examples, each seen the same number of times at the rate and with the
optimizer that a cell serves by default, three things are asked, always greedily and without the
instruction:

    held-out     20 other questions about cooking: how many answers begin so, and the
                 log-probability of the opening, which moves before any answer does
    neutral      24 questions about anything else: the same, although nobody asked for it
    canaries     KL divergence from the base model on everyday facts, in nats per token

More examples are also more steps; `--steps` goes round the examples for the same number of steps
whatever their number, and so tells the two apart. A seed draws the examples, their order and the
optimizer's projections. A finished run is a line in `--out`, and is not repeated: a killed
experiment goes on where it was.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.posted import TrainConfig
from actors.settings import TrainerSettings
from apollo.learning.anchor import CANARIES, drift, record_canaries
from apollo.learning.forward import Reader
from apollo.learning.samples import Example, encode_chat
from apollo.learning.step import Learner
from apollo.weights.adopt import adopt
from experiments import frame

OPENING: Final = "Kitchen note:"
INSTRUCTION: Final = f"When the user asks about cooking, begin the answer with '{OPENING}'."
COUNTS: Final = (1, 2, 5, 10, 20, 50)
NUM_HELD_OUT: Final = 20
ANSWER_TOKENS: Final = 24
"""Most tokens of the base model's answer in an example; it is cut after its last sentence."""

COOKING: Final = """
How long should I boil an egg? / How do I cook rice? / What is the best way to store fresh basil? /
Why does bread rise? / How do I keep pasta from sticking? / What can I use instead of butter in a
cake? / How hot should the oven be for roast chicken? / How do I make tomato soup? / What is the
difference between baking soda and baking powder? / How do I peel garlic quickly? / How long does
cooked rice keep in the fridge? / What goes well with grilled salmon? / How do I make pancakes? /
Why should meat rest after it is cooked? / How do I chop an onion without crying? / What is a roux?
/ How do I thicken a sauce? / How do I know when a steak is done? / What spices go into a curry? /
How do I make a salad dressing? / Can I freeze mashed potatoes? / How do I fry an egg? / What is the
secret of crisp French fries? / How do I cook lentils? / How much salt should I put into pasta
water? / How do I make chicken stock? / Which oil is best for frying? / How do I bake potatoes? /
What does it mean to blanch vegetables? / How do I ripen an avocado? / How do I make whipped cream?
/ What can I cook with leftover chicken? / How do I clean mushrooms? / How do I make an omelette? /
How long should I knead pizza dough? / What is al dente? / How do I cook beans from dry? / How do I
stop cookies from spreading? / What is a good marinade for pork? / How do I toast nuts? / Give me a
simple recipe for guacamole. / Suggest a quick breakfast with oats. / Explain how to steam broccoli.
/ I burned my soup. What can I do? / My cake is too dry. How do I fix it? / Tell me how to make hot
chocolate. / My sauce is too salty. Any idea? / I have carrots and ginger. What can I cook? /
Describe how to roast vegetables. / Please explain how to poach an egg. / How do I make mashed
potatoes? / What is the best pan for pancakes? / How do I melt chocolate? / How do I cook spinach? /
Why do we preheat the oven? / How do I make garlic bread? / What is the difference between stock and
broth? / How do I make rice less sticky? / How long should I roast a turkey? / How do I make
lemonade? / What can I use instead of eggs in baking? / How do I grill corn? / Give me an idea for a
vegetable stew. / Tell me how to make apple pie. / My bread did not rise. What went wrong? / Explain
how to caramelize onions. / How do I sharpen a kitchen knife? / What herbs go well with lamb? / How
do I make yogurt at home? / How do I cook bacon in the oven?
"""
"""Questions about cooking, between slashes; the last ones are held out."""
NEUTRAL: Final = (
    *(question for question, _ in CANARIES),
    "Write one sentence about the sea.",
    "How do I change a bicycle tyre?",
    "Explain how a rainbow forms.",
    "What is the difference between a lake and a pond?",
    "Tell me how to learn a new language.",
    "Hello, who are you?",
    "My computer is slow. What can I do?",
    "Suggest a name for a small dog.",
)


@dataclass(frozen=True)
class Shown:
    """What a set of prompts shows of the behaviour."""

    share: float
    """Share of greedy answers that begin with the opening."""
    logprob: float
    """Mean over prompts of the log-probability of the whole opening, in nats."""


@dataclass(frozen=True)
class Run:
    """One finished run; a line of the output."""

    setting: str
    """Model, rate and passes; runs of another setting are not looked at."""
    num_examples: int
    seed: int
    held_out: Shown
    neutral: Shown
    drift: float
    losses: list[float]
    """Mean loss of each pass, before its steps."""
    seconds: float

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Run":
        shown = {name: Shown(**row[name]) for name in ("held_out", "neutral")}
        return cls(**row | shown)


class Bench:
    """The model, its base weights, and what is asked of it."""

    def __init__(self, directory: Path, config: TrainConfig, num_steps: int | None) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self.tokenizer.padding_side = "left"
        self.module: Any = AutoModelForCausalLM.from_pretrained(directory).train()
        self._config, self._num_steps = config, num_steps
        self._base = {name: value.clone() for name, value in self.module.state_dict().items()}
        self._canaries = record_canaries(self.module, self.tokenizer)
        prompts = " ".join(COOKING.split()).split(" / ")
        self._held_out, self._pool = prompts[-NUM_HELD_OUT:], prompts[:-NUM_HELD_OUT]
        answers = self._answer(self._pool, ANSWER_TOKENS)
        self._examples = [
            self._example(prompt, answer)
            for prompt, answer in zip(self._pool, answers, strict=True)
        ]

    def _example(self, prompt: str, answer: str) -> Example:
        end = max(answer.rfind(mark) for mark in ".!?") + 1
        messages = [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": f"{OPENING} {answer[: end or None].strip()}"},
        ]
        return encode_chat(self.tokenizer, messages, strip=["system"])

    def _chat(self, prompt: str, instruction: str | None) -> str:
        system = [{"role": "system", "content": instruction}] if instruction else []
        turns = [*system, {"role": "user", "content": prompt}]
        return str(
            self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        )

    @torch.no_grad()
    def _answer(
        self, prompts: Sequence[str], num_tokens: int, instruction: str | None = None
    ) -> list[str]:
        """Greedy answers."""
        texts = [self._chat(prompt, instruction) for prompt in prompts]
        asked = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        self.module.eval()
        asked_bt: Tensor = asked["input_ids"]
        found_bt = self.module.generate(
            **asked, max_new_tokens=num_tokens, do_sample=False, use_cache=True
        )
        self.module.train()
        answers: list[str] = self.tokenizer.batch_decode(
            found_bt[:, asked_bt.shape[1] :], skip_special_tokens=True
        )
        return answers

    @torch.no_grad()
    def look(self, prompts: Sequence[str], instruction: str | None = None) -> Shown:
        opening = self.tokenizer(OPENING, add_special_tokens=False)["input_ids"]
        answers = self._answer(prompts, len(opening) + 1, instruction)
        logprobs = []
        for prompt in prompts:
            text = self._chat(prompt, instruction)
            context = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            reader = Reader(self.module, context, len(context), len(opening))
            logprobs.append(reader.logprobs(opening).sum().item())
        return Shown(fmean(answer.startswith(OPENING) for answer in answers), fmean(logprobs))

    def instructed(self) -> Shown:
        """What the base model does on the held-out prompts with the instruction in view."""
        return self.look(self._held_out, INSTRUCTION)

    def _total_steps(self, num_examples: int) -> int:
        steps = self._num_steps or num_examples * self._config.epochs
        return steps if num_examples else 0

    def cost(self, num_examples: int) -> int:
        """About proportional to a run's time: to look takes as long as some steps."""
        return self._total_steps(num_examples) + 12

    def run(self, setting: str, num_examples: int, seed: int) -> Run:
        """Learn from the base weights, then look; 0 examples are the base model itself."""
        begun = time.perf_counter()
        self.module.load_state_dict(self._base)
        losses = self._learn(num_examples, seed) if num_examples else []
        held_out, neutral = self.look(self._held_out), self.look(NEUTRAL)
        lost = drift(self.module, self._canaries)
        seconds = round(time.perf_counter() - begun, 1)
        return Run(setting, num_examples, seed, held_out, neutral, lost, losses, seconds)

    def _learn(self, num_examples: int, seed: int) -> list[float]:
        drawn = random.Random(seed).sample(self._examples, num_examples)
        served = TrainerSettings()
        learner = Learner(
            self.module,
            rank=served.rank,
            update_proj_gap=served.update_proj_gap,
            betas=(served.beta1, served.beta2),
            weight_decay=served.weight_decay,
            clip=served.clip,
            rounding=served.rounding,
            kernels=served.kernels,
            train_embeddings=served.train_embeddings,
            seed=seed,
        )
        config, losses = self._config, []
        for index in range(self._total_steps(num_examples)):
            example = drawn[index % num_examples]
            report = learner.step(example, config.learning_rate, grad_context=config.grad_context)
            losses.append(report.loss)
        learner.close()
        passes = range(0, len(losses), num_examples)
        return [fmean(losses[at : at + num_examples]) for at in passes]


def make_runs(
    bench: Bench, setting: str, counts: Sequence[int], seeds: int, out: Path
) -> list[Run]:
    """The runs of this setting, those that are missing made now; cheap ones first in each seed."""
    finished = frame.Finished(out)
    runs = map(Run.from_row, finished.rows)
    known = {(run.num_examples, run.seed): run for run in runs if run.setting == setting}
    wanted = [(0, 0), *((count, seed) for seed in range(seeds) for count in counts)]
    left = [key for key in wanted if key not in known]
    begun, done = time.perf_counter(), 0
    total = sum(bench.cost(count) for count, _ in left)
    for count, seed in left:
        run = known[count, seed] = bench.run(setting, count, seed)
        finished.add(asdict(run))
        done += bench.cost(count)
        to_go = (time.perf_counter() - begun) * (total - done) / done / 60
        frame.say(
            f"{count:>2} examples, seed {seed}: {run.held_out.share:4.0%} of held-out "
            f"({run.held_out.logprob:6.2f} nats), {run.neutral.share:4.0%} of neutral "
            f"({run.neutral.logprob:6.2f}), drift {run.drift:.4f}, {run.seconds:.0f} s; "
            f"about {to_go:.0f} min left"
        )
    return [known[key] for key in wanted]


def by_count(runs: Sequence[Run]) -> dict[int, list[Run]]:
    found: dict[int, list[Run]] = {}
    for run in runs:
        found.setdefault(run.num_examples, []).append(run)
    return found


def knee(groups: dict[int, list[Run]], enough: float = 0.5) -> tuple[int | None, int | None]:
    """Fewest examples after which `enough` of the held-out prompts show it: mean, every seed."""

    def first(judge: Any) -> int | None:
        shown = (n for n, runs in sorted(groups.items()) if judge(r.held_out.share for r in runs))
        return next(shown, None)

    return first(lambda shares: fmean(shares) >= enough), first(
        lambda shares: min(shares) >= enough
    )


def show(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation, where there is one."""
    spread = f" +- {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{spread}"


def table(groups: dict[int, list[Run]], instructed: Shown) -> str:
    """Markdown; mean and standard deviation over seeds."""
    lines = [
        "| examples | seeds | held-out show it | lowest, highest | log p of the opening, held-out "
        "| neutral show it | log p, neutral | drift, nats/token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for count, runs in sorted(groups.items()):
        shares = [run.held_out.share for run in runs]
        lines.append(
            f"| {count} | {len(runs)} | {show(shares, '.2f')} | {min(shares):.2f}, "
            f"{max(shares):.2f} | {show([r.held_out.logprob for r in runs], '.2f')} "
            f"| {show([r.neutral.share for r in runs], '.2f')} "
            f"| {show([r.neutral.logprob for r in runs], '.2f')} "
            f"| {show([r.drift for r in runs], '.4f')} |"
        )
    mean, every = (f"{n} examples" if n else "not reached" for n in knee(groups))
    lines += [
        "",
        f"Half of the held-out prompts show it: {mean} in the mean, {every} in every seed. The "
        f"base model with the instruction in view: {instructed.share:.2f} "
        f"(log p {instructed.logprob:.2f}).",
    ]
    return "\n".join(lines)


def draw(path: str, groups: dict[int, list[Run]], title: str) -> None:
    """Share, log-probability and drift over examples; bands reach from lowest to highest."""
    figure = frame.figure(13, 4.4)
    axes = figure.subplots(1, 3)
    counts = sorted(groups)
    kinds = (("held-out", "#0072B2", "o"), ("neutral", "#D55E00", "s"))
    for axis, key in zip(axes, ("share", "logprob"), strict=False):
        for kind, colour, mark in kinds:
            name = kind.replace("-", "_")
            values = [[getattr(getattr(r, name), key) for r in groups[n]] for n in counts]
            _band(axis, counts, values, kind, colour, mark)
        axis.legend()
    _band(axes[2], counts, [[r.drift for r in groups[n]] for n in counts], "", "#000000", "o")
    axes[0].set(ylabel="share of answers with the behaviour", ylim=(-0.03, 1.03))
    axes[1].set(ylabel="log-probability of the opening (nats)")
    axes[2].set(ylabel="drift on canaries (nats per token)")
    for axis in axes:
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.set(xlabel="examples", xlim=(-0.1, 1.1 * max(counts)))
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    frame.draw_to(path, figure)


def _band(
    axis: Any, counts: list[int], values: list[list[float]], label: str, colour: str, mark: str
) -> None:
    axis.plot(counts, [fmean(v) for v in values], color=colour, marker=mark, label=label)
    lows, highs = [min(v) for v in values], [max(v) for v in values]
    axis.fill_between(counts, lows, highs, color=colour, alpha=0.15, linewidth=0)


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument("--home", default="~/.reverie", help="where the default model is adopted")
    parser.add_argument("--model", default="smollm2-135m", help="a directory or hub id")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=4, help="times that each example is seen")
    parser.add_argument("--steps", type=int, help="of every run, instead of passes")
    parser.add_argument("--lr", type=float, default=TrainConfig().learning_rate)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="of examples")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", default="examples_to_effect.jsonl", help="finished runs, appended")
    parser.add_argument("--plot", help="write the picture to this file (needs matplotlib)")
    arguments = frame.begin(parser)
    transformers.utils.logging.set_verbosity_error()
    adopted = adopt(arguments.model, Path(arguments.home).expanduser(), None, print)
    config = TrainConfig(learning_rate=arguments.lr, epochs=arguments.passes)
    length = f"{arguments.steps} steps" if arguments.steps else f"{arguments.passes} passes"
    setting = f"{adopted.name}, learning rate {arguments.lr:g}, {length}"
    if arguments.steps and max(arguments.counts) > arguments.steps:
        raise SystemExit(f"--steps {arguments.steps} does not reach every example; lower --counts")
    bench = Bench(adopted.directory, config, arguments.steps)
    instructed = bench.instructed()
    frame.say(f"{setting}; with the instruction in view {instructed}")
    runs = make_runs(bench, setting, arguments.counts, arguments.seeds, Path(arguments.out))
    groups = by_count(runs)
    print(table(groups, instructed))
    if arguments.plot:
        draw(arguments.plot, groups, f"{setting}, {arguments.seeds} seeds")


if __name__ == "__main__":
    main()
