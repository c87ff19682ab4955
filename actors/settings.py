"""Every knob of a cell: frozen models, unknown keys refused, a docstring under each field.

Imports neither torch nor Ray, so that a command line can read settings in milliseconds.
"""

from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from actors.errors import SettingsError
from actors.home import DEFAULT_MODEL as DEFAULT_MODEL
from actors.home import GIB as GIB
from actors.home import MIB as MIB
from actors.home import default_home as default_home


class _Group(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read_absence(cls, value: Any) -> Any:
        """A command line has only words."""
        return None if value == "none" else value


class EngineSettings(_Group):
    """vLLM and the memory it owns."""

    threads: int = Field(default=1, ge=1, le=256)
    """OpenMP threads of vLLM's engine process on a CPU; the trainer has its own."""
    max_model_len: int = Field(default=2048, ge=16, le=1_048_576)
    """Longest context, in tokens, that a request may reach (clamped to what the model supports)."""
    max_num_seqs: int = Field(default=32, ge=1, le=4096)
    """Most requests in one batch."""
    kv_cache_bytes: int = Field(default=1 * GIB, ge=16 * MIB)
    """Size of the KV cache; explicit because vLLM does not know of the trainer's memory."""
    enforce_eager: bool = True
    """Run without compilation and CUDA graphs. On a CPU compilation costs minutes at start."""
    tool_call_parser: str | None = "hermes"
    """vLLM's parser for tool calls (`hermes`, `qwen3_coder`, ...): how this model words them. One
    that a request names or requires is made by any model, and if the tool says `strict`, with
    arguments of its schema. `none` turns tools off."""
    boot_timeout_s: float = Field(default=600, gt=0)
    """Longest time from starting vLLM to its first readiness."""


class TrainerSettings(_Group):
    """The optimizer and how much of the machine it may take."""

    threads: int = Field(default=1, ge=1, le=256)
    """Threads of the trainer's tensor arithmetic."""
    nice: int = Field(default=5, ge=0, le=19)
    """Scheduling priority of the trainer below the engine: serving goes first."""
    duty: float = Field(default=1.0, ge=0.01, le=1)
    """Share of the time the trainer may compute; it sleeps for the rest. A job may ask for less."""
    latency_budget_ms: float | None = Field(default=100, gt=0)
    """Time between two tokens of a streamed answer that 95 of 100 shall keep to: while anybody is
    answered the trainer computes only as much as allows that, and freely when nobody is. 100 ms a
    token is faster than people read, on any machine; a GPU that gives one in 15 ms may be held to
    30. `none`: it gives way to nobody."""
    min_duty: float = Field(default=0.25, ge=0.01, le=1)
    """Share of the time that it computes even if the budget is not kept: learning never stops."""
    rank: int = Field(default=64, ge=1, le=8192)
    """Rank of APOLLO's projection; 1 is APOLLO-Mini, with nearly no optimizer state. A matrix whose
    smaller side is not above it gets plain Adam."""
    update_proj_gap: int = Field(default=200, ge=1)
    """Steps after which the projection is drawn anew."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the second moment; short runs want less than the usual 0.999."""
    weight_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decoupled weight decay, per step and learning rate."""
    clip: float | None = Field(default=3.0, ge=1)
    """Bound of a tensor's update, in running means of its norm; None turns it off."""
    rounding: Literal["stochastic", "nearest", "corrected"] = "stochastic"
    """How an update becomes bfloat16; `corrected` keeps 8 more bits of each weight beside it, and
    `nearest` loses most of a small step."""
    kernels: Literal["auto", "eager", "compiled", "triton"] = "auto"
    """Implementation of the update; `auto` is `triton` on a GPU and `eager` on a CPU, where
    `compiled` is quicker, after a minute of compiling."""
    train_embeddings: bool = False
    """Whether the embedding (and an lm_head tied to it) is trained too."""
    checkpoint_layers: bool = False
    """Compute each layer again in the backward pass instead of keeping what it computed: about a
    third slower, a tenth of the activations."""
    max_step_tokens: int = Field(default=4096, ge=16)
    """Most tokens of one step that the gradient flows through; a sample with more is refused."""
    max_step_bytes: int | None = Field(default=None, ge=MIB)
    """Most memory that a step may take beyond weights and optimizer state, as estimated when a
    sample is posted; None does not ask."""
    step_deadline_s: float = Field(default=300, gt=0)
    """A step whose forward pass has used a third of this is given up, and its job fails."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the projections and of stochastic rounding."""
    epoch_steps: int = Field(default=8, ge=1)
    """Optimizer steps after which cached prefixes are retired; the end of a job always does."""
    max_queued_samples: int = Field(default=4096, ge=1)
    """Bound of the queue; a request that would exceed it gets 429."""
    attach_timeout_s: float = Field(default=120, gt=0)
    """Longest time for building the module over the shared weights."""
    step_timeout_s: float = Field(default=600, gt=0)
    """Longest time a checkpoint waits for the step in progress."""
    pause_engine: bool = False
    """Experimental: run no forward pass during a step, so that none reads weights half written.
    Answers stall for the whole step, at most `step_deadline_s`. See experiments/hogwild.py."""


class JournalSettings(_Group):
    """What is kept of the weights, and when."""

    commit_every_s: float = Field(default=600, ge=1)
    """Time of learning after which what was learned is committed to the journal by itself."""
    publish_every_s: float = Field(default=3600, ge=1)
    """Time after which the newest generation is published by itself."""
    keep_all_s: float = Field(default=24 * 3600, ge=0)
    """Age up to which every generation is kept."""
    keep_hourly_s: float = Field(default=7 * 24 * 3600, ge=0)
    """Age up to which the newest generation of each hour is kept; then that of each day."""
    max_age_s: float | None = Field(default=None, ge=0)
    """Age beyond which no generation is kept but the newest and the public one; None keeps them."""
    threads: int = Field(default=2, ge=1)
    """Threads that copy the weights while the trainer waits, and that hash and encode them."""
    moves: Literal["all", "changed"] = "all"
    """What a commit takes of the live weights: all, or what has changed since the last, for which
    the trainer notes a bit for each element. That is meant for bfloat16 weights on a GPU."""


class Budgets(_Group):
    """What a dream round may do to the model; outside of one of them it is taken back."""

    max_kl: float = Field(default=0.5, gt=0)
    """KL divergence from the model before all dreams, on the canaries, in nats per token."""
    max_kl_per_round: float = Field(default=0.25, gt=0)
    """How much of that one round may add."""
    min_entropy: float = Field(default=0.6, ge=0, le=1)
    """Entropy of freely sampled tokens, as a share of the base's."""
    max_repetition_rise: float = Field(default=0.2, ge=0, le=1)
    """More repeated 4-grams in long answers than the base has, as a share of all."""
    max_facts_drop: float = Field(default=0.15, ge=0, le=1)
    """Simple questions that the base answers rightly and the model does not, as a share."""
    max_pushback_drop: float = Field(default=0.1, ge=0, le=1)
    """How far the mean preference, from 0 to 1, for refuting a user's false claims may fall."""
    max_success_drop: float = Field(default=0.25, ge=0, le=1)
    """How far a behaviour that was not dreamt of may fall on its held-out scenarios."""


class DreamSettings(_Group):
    """The dream loop: when it runs, what a round is made of, and what stops it."""

    when_idle: bool = False
    """Dream by itself when nobody has asked anything for `idle_s`; else only on command."""
    idle_s: float = Field(default=60, ge=0)
    """Time without a request after which nobody is held to need the machine."""
    yield_s: float = Field(default=2, ge=0)
    """A dream that is interrupted by a request goes on this long after the last one."""
    max_tokens_per_day: int = Field(default=2_000_000, ge=0)
    """Tokens that dreams may have the model write or read in 24 hours."""
    max_steps_per_day: int = Field(default=5_000, ge=0)
    """Optimizer steps that dreams may make in 24 hours."""
    max_seconds_per_day: float = Field(default=6 * 3600, ge=0)
    """Time that dreams may take in 24 hours, waiting not counted."""
    scenarios: int = Field(default=36, ge=2, le=512)
    """Situations that a round learns from: up to three times as many are invented, until there are
    so many in which the behaviour does not show yet."""
    answers: int = Field(default=4, ge=1, le=64)
    """Candidates for each of them, with the instruction in view."""
    kept_per_scenario: int = Field(default=1, ge=1, le=64)
    """Most answers to one situation that are learned."""
    min_kept: int = Field(default=4, ge=1)
    """A round that keeps fewer answers teaches nothing: they would weigh too much."""
    held_out: int = Field(default=16, ge=4, le=256)
    """Situations of each behaviour that are only ever used to test it."""
    canaries: int = 64
    """Prompts that the gate measures by, half of them short; fewer are quicker and noisier."""
    rehearsal: float = Field(default=0.25, ge=0, le=1)
    """Items of other behaviours, learned earlier, as a share of what is new."""
    replay: float = Field(default=0.25, ge=0, le=1)
    """The base's own answers to general prompts, as a share of what is new."""
    min_divergence: float = Field(default=0.05)
    """Below it (nats per token) an answer has nothing left to teach."""
    max_divergence: float = Field(default=3.0)
    """Above it an answer is too far from what the model would say without the instruction."""
    objective: Literal["sft", "distill"] = "sft"
    """What is learned of an answer: its tokens, or the whole distribution behind them."""
    learning_rate: float = Field(default=2e-5, gt=0, le=1e-2)
    """Of a round; halved when it is tried again."""
    epochs: int = Field(default=1, ge=1, le=100)
    """Passes over a round's items."""
    trainer_threads: int = Field(default=2, ge=1, le=256)
    """Threads of the trainer's arithmetic in them: nobody is answered then, so the engine's core is
    free as well."""
    is_gated: bool = True
    """Whether a round outside a budget is taken back. Turn it off in experiments only."""
    round_timeout_s: float = Field(default=4 * 3600, gt=0)
    """Longest time of a round, waiting for clients included; then it is taken back."""
    max_rounds_queued: int = Field(default=64, ge=1)
    """Most rounds that may be asked for and not done."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of everything that a round draws."""
    log_conversations: bool = False
    """Keep chats in which an instruction was in view, so that their answers can become candidates
    for learning; a request's header `x-reverie-log: on` or `off` wins."""
    candidate_divergence: float = Field(default=0.3, gt=0)
    """An answer that its instructions make so much likelier (nats per token) is a candidate."""
    approved_per_day: int = Field(default=0, ge=0)
    """Candidates that are approved without a person in 24 hours, of clients who may teach and up to
    `max_divergence`; what they teach passes no gate."""
    budgets: Budgets = Budgets()

    @field_validator("canaries")
    @classmethod
    def _check_canaries(cls, canaries: int) -> int:
        if canaries not in (8, 16, 32, 64):
            raise ValueError("choose 8, 16, 32 or 64")
        return canaries

    @model_validator(mode="after")
    def _check_band(self) -> Self:
        if self.min_divergence >= self.max_divergence:
            raise ValueError(
                f"min_divergence={self.min_divergence:g} is not below "
                f"max_divergence={self.max_divergence:g}; nothing could be learned"
            )
        return self


class LimitSettings(_Group):
    """What one request may ask for."""

    max_body_bytes: int = Field(default=8 * MIB, ge=1024)
    """Largest request body."""
    max_samples: int = Field(default=256, ge=1)
    """Most samples in one `POST /train`."""
    max_ongoing_requests: int = Field(default=128, ge=1)
    """Most requests inside the ingress at once; further ones get 429."""
    request_timeout_s: float = Field(default=600, gt=0)
    """Longest time for one request, streaming included."""
    body_timeout_s: float = Field(default=30, gt=0)
    """Longest time in which a request's body must have arrived; a body that drips gets 408."""
    control_timeout_s: float = Field(default=60, gt=0)
    """Longest wait for the answer to a control route (a checkpoint has its own limit)."""


class LogSettings(_Group):
    """What processes log, into Ray's files: `reverie logs`."""

    format: Literal["plain", "json"] = "plain"
    """Lines for people, or one JSON object a line, with the same ids in both."""
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """From which on; INFO has a line for each request, job, commit and some steps, DEBUG one for
    each look at `/status`, too. Other people's code warns only."""


class CellSettings(_Group):
    """Supervision."""

    check_interval_s: float = Field(default=1.0, gt=0, le=5)
    """Time between two looks at the actors and at vLLM's child process."""
    hang_timeout_s: float = Field(default=30.0, ge=1)
    """An actor that lives but is silent for this long counts as hung; a dead one shows at once."""
    ray_metrics_s: float = Field(default=10, ge=0)
    """Time after which the numbers of `/metrics` are given to Ray's own exporter, too; 0: never."""
    max_restarts: int = Field(default=20, ge=0)
    """Restarts within `restart_window_s` after which the cell stays down and says why."""
    restart_window_s: float = Field(default=600, gt=0)
    """Window in which restarts are counted."""
    checkpoint_timeout_s: float = Field(default=600, gt=0)
    """Longest time a checkpoint may take."""
    drain_timeout_s: float = Field(default=30, ge=0)
    """At a stop: longest time for which answers that have begun may go on; new requests get 503."""


class Settings(_Group):
    """One cell."""

    model: str = DEFAULT_MODEL
    """A local directory, a hub id, or `smollm2-135m`, the small default model."""
    home: Path = Field(default_factory=default_home)
    """Where adopted models, the ledger and keys live."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the weights live; `auto` takes a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the one copy of the weights; `auto` is float32 on a CPU, bfloat16 on a GPU."""
    host: str = "127.0.0.1"
    """Address of the door; any but a loopback address needs API keys (`reverie keys add`)."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port of the door."""
    engine: EngineSettings = EngineSettings()
    trainer: TrainerSettings = TrainerSettings()
    journal: JournalSettings = JournalSettings()
    dream: DreamSettings = DreamSettings()
    limits: LimitSettings = LimitSettings()
    logs: LogSettings = LogSettings()
    cell: CellSettings = CellSettings()

    @field_validator("home")
    @classmethod
    def _make_absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        if self.host != "localhost":
            try:
                ip_address(self.host)
            except ValueError:
                raise ValueError(
                    f"host={self.host!r} is not an IP address; use 127.0.0.1"
                ) from None
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the door."""
        return self.host == "localhost" or ip_address(self.host).is_loopback

    @classmethod
    def from_pairs(cls, pairs: Mapping[str, Any]) -> "Settings":
        """Settings from flat `group.key: value` pairs, as a command line or `serve run` gives them.

        Raises SettingsError that names the key, the value and what is allowed.
        """
        tree: dict[str, Any] = {}
        for dotted, value in pairs.items():
            *groups, key = dotted.split(".")
            node = tree
            for group in groups:
                node = node.setdefault(group, {})
                if not isinstance(node, dict):
                    raise SettingsError(f"{dotted}: {group!r} is not a group of settings")
            node[key] = value
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise SettingsError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown setting {where}; the known ones are in actors/settings.py")
        else:
            lines.append(f"{where or 'settings'}={item['input']!r}: {item['msg']}")
    return "; ".join(lines)
