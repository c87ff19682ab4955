"""Frozen records that cross a process boundary; each says who produces it and who consumes it.

What comes from outside is in `posted`, and is checked; everything between our own processes is a
frozen dataclass.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from actors.distribution import NOTHING, Distribution
from actors.posted import TrainConfig

JobState = Literal["queued", "training", "done", "failed", "cancelled"]
EndState = Literal["done", "failed", "cancelled"]
SampleState = Literal["queued", "trained", "failed", "cancelled"]
CellState = Literal["starting", "ready", "recovering", "stopping", "failed"]


@dataclass(frozen=True)
class TrainingSample:
    """A tokenised, checked sample: produced by the trainer's door, kept by the ledger."""

    id: str
    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...] = ()
    teacher_context_ids: tuple[int, ...] = ()
    """The context with its instructions, where they were stripped from `context_ids`."""
    weight: float = 1.0
    source: str | None = None
    content_hash: str = ""
    """Hash of what the client posted, so that one id with two contents is a conflict."""


@dataclass(frozen=True)
class QueuedJob:
    """What to train next: produced by the ledger, consumed by the trainer."""

    job_id: str
    samples: tuple[TrainingSample, ...]
    config: TrainConfig
    steps_done: int
    """Steps that the weights already contain; the job resumes at this step."""
    round_id: str | None = None
    """The dream round that it belongs to: it gives way to clients and their jobs."""
    trace: str | None = None
    """What leads back to the request that posted it."""
    again_until: int | None = None
    """It had ended before it was undone: so many steps, and it ends as it had."""
    ends_as: EndState = "done"
    error: str | None = None

    @property
    def total_steps(self) -> int:
        return len(self.samples) * self.config.epochs

    @property
    def end(self) -> int:
        """The step before which it ends."""
        return self.total_steps if self.again_until is None else self.again_until


@dataclass(frozen=True)
class Acceptance:
    """Answer to `POST /train`: produced by the ledger once the samples are durable."""

    job_id: str
    status: JobState
    training_samples: int
    duplicates: tuple[str, ...] = ()
    """Ids that had been accepted before with the same content; not queued again."""


@dataclass(frozen=True)
class JobView:
    """A job as the routes show it: produced by the ledger, consumed by the ingress."""

    job_id: str
    status: JobState
    created: float
    training_samples: int
    steps: int
    total_steps: int
    loss_history: tuple[float, ...]
    weights_version_before: int | None
    weights_version: int | None
    error: str | None
    config: dict[str, Any] = field(default_factory=dict)
    seconds_per_step: float | None = None
    trace: str | None = None
    """Trace-id, or `x-request-id`, of the request that posted it; a dream's is its round."""


@dataclass(frozen=True)
class CellPaths:
    """Where one boot of a cell keeps what its processes share: made by the cell, read by all."""

    model_dir: str
    """The public directory of the model."""
    run_dir: str
    """Private directory in shared memory: weights, versions, layout, socket; gone after a stop."""
    ledger: str

    @property
    def model(self) -> str:
        """The name under which it is served."""
        return self.model_dir.rpartition("/")[2]

    @property
    def dream(self) -> str:
        """The dream loop's database, beside the ledger."""
        return f"{self.ledger.removesuffix('ledger.sqlite')}dream.sqlite"

    @property
    def weights(self) -> str:
        return f"{self.run_dir}/weights"

    @property
    def versions(self) -> str:
        return f"{self.run_dir}/versions"

    @property
    def traffic(self) -> str:
        return f"{self.run_dir}/traffic"

    @property
    def layout(self) -> str:
        return f"{self.run_dir}/layout.json"

    @property
    def changed(self) -> str:
        """Maps of what the trainer has changed, with `journal.moves=changed`."""
        return f"{self.run_dir}/changed"

    @property
    def progress(self) -> str:
        return f"{self.run_dir}/progress"

    @property
    def optimizer(self) -> str:
        """The optimizer's state, on its way from the trainer to the journal."""
        return f"{self.run_dir}/optimizer.safetensors"

    @property
    def vllm_files(self) -> str:
        """List of the shared-memory files that vLLM made for itself and leaves behind if killed."""
        return f"{self.run_dir}/vllm_files"

    @property
    def socket(self) -> str:
        return f"{self.run_dir}/engine.sock"


@dataclass(frozen=True)
class EngineReport:
    """The engine's state: produced by the engine, consumed by the cell and `/status`."""

    pid: int
    child_pids: tuple[int, ...]
    is_healthy: bool
    max_model_len: int = 0
    reason: str | None = None
    vllm_version: str = ""


@dataclass(frozen=True)
class TrainerReport:
    """The trainer's state: produced by the trainer, consumed by the cell and `/status`."""

    pid: int
    weights_version: int
    num_tensors: int = 0
    weights_bytes: int = 0
    state_bytes: int = 0
    """Optimizer state."""
    queued_samples: int = 0
    job_id: str | None = None
    steps: int = 0
    last_loss: float | None = None
    last_step_s: float | None = None
    """Time that the newest step computed."""
    last_rested_s: float | None = None
    """Time that it stood still in between, for those who were answered."""
    duty: float = 1.0
    """Share of the time that it may compute just now: less than 1 while anybody is answered."""
    last_update_rms: float | None = None
    """Root mean square of the newest step's update, over its learning rate."""
    last_changed: float | None = None
    """Share of the weights' elements that it changed; near 0 it is being rounded away."""
    last_limited: int | None = None
    """Number of tensors whose update it had to clip."""
    last_step_bytes: int | None = None
    """Most memory that the newest step took beyond what was there before it."""
    step_seconds: Distribution = NOTHING
    """Of all steps since this trainer started."""
    learned_tokens: int = 0
    """Likewise: of continuations, as often as they were learned."""
    last_parts: dict[str, float] = field(default_factory=dict)
    """Seconds of the newest step by what they were spent on: reading the context (`prefix`),
    `forward`, `backward`, `optimizer`; on a GPU by its own clock."""
    samples: dict[SampleState, int] = field(default_factory=dict)
    """How many the ledger has in each state."""
    on_trial: str | None = None
    """The dream round whose steps are in the weights and have not passed the gate."""
    paused: str | None = None
    """What training waits for (a full disk); it goes on by itself."""
    reason: str | None = None
    """Why training stopped for good; None while all is well."""


@dataclass(frozen=True)
class Hold:
    """The trainer stands between two steps: produced by it, consumed by the checkpoint actor."""

    token: str
    weights_version: int
    next_version: int
    """A version that was never announced, nor reserved."""
    has_optimizer: bool = False
    """Whether the optimizer's state lies at `CellPaths.optimizer`."""
    optimizer_step: int = 0
    on_trial: str | None = None
    """The dream round that these weights may not be kept with, until it has passed."""


@dataclass(frozen=True)
class TakeBack:
    """What a dream taught shall not have been: produced by it, done by the checkpoint actor."""

    sample_ids: tuple[str, ...]
    """They are forgotten; what else was learned since the first of them is learned again."""


@dataclass(frozen=True)
class Return:
    """A return is public: produced by the checkpoint actor, its weights taken by the trainer."""

    token: str
    """Of the hold under which it is made."""
    weights_version: int


@dataclass(frozen=True)
class Checkpoint:
    """One committed state of the weights: produced by the checkpoint actor."""

    generation: int
    weights_version: int
    created: float
    size_bytes: int
    """What it takes in the journal, without the optimizer's state."""
    seconds: float = 0.0
    stall_seconds: float = 0.0
    """How long the trainer waited."""


@dataclass(frozen=True)
class CheckpointReport:
    """The checkpoint actor's state, for the cell and `/status`."""

    pid: int
    generation: int
    """The newest that is durable."""
    weights_version: int
    public_generation: int = 0
    """The one in the public directory."""
    is_swap_atomic: bool = True  # False where directories cannot be exchanged in one step.
    last: Checkpoint | None = None
    """The newest commit of this boot."""
    changed_share: float | None = None
    """Elements of the weights that it changed, as a share."""
    commit_seconds: Distribution = NOTHING
    """Of all commits since this actor started."""
    stall_seconds: Distribution = NOTHING
    """How long the trainer waited for each."""
    commit_bytes: int = 0
    """What they take in the journal, added up."""
    paused: str | None = None
    """Why nothing can be kept just now; the trainer waits with it, and it is tried again."""
    reason: str | None = None
    """Why the cell must restart; None while all is well."""


@dataclass(frozen=True)
class GenerationView:
    """One generation that can be returned to: produced by the checkpoint actor."""

    generation: int
    kind: str
    parent: int | None
    weights_version: int
    created: float
    size_bytes: int
    is_public: bool
    has_optimizer: bool  # Whether a return to it goes on with its optimizer's moments.
    returns_to: int | None
    root: str
    """Equal for equal weights."""


@dataclass(frozen=True)
class Verification:
    """What a full check of all that is kept has found: produced by the checkpoint actor."""

    damaged_files: tuple[str, ...]
    damaged_copies: tuple[str, ...]
    """Directory and tensor; another copy may give the values all the same."""
    lost_generations: tuple[int, ...]
    """Those that cannot be returned to any more."""
    bytes_read: int


@dataclass(frozen=True)
class DreamReport:
    """The dream actor's state, for the cell and `/status`."""

    pid: int
    state: Literal["idle", "dreaming", "waiting"] = "idle"
    """`waiting`: for clients, who are answered first."""
    round_id: str | None = None
    behaviour: str | None = None
    stage: str | None = None
    done: int = 0
    total: int = 0
    """Of the stage: scenarios, answers, steps."""
    asked: int = 0
    """Rounds that were asked for and have not begun."""
    unscored: int = 0
    """Logged exchanges that are to be looked at."""
    proposed: int = 0
    """Candidates that wait for a decision."""
    kl: float | None = None
    """From the model before all dreams, in nats per token, as the gate measured it last."""
    paused: str | None = None
    """Why none begins (a budget); it goes on by itself."""
    reason: str | None = None
    """Why the loop ended for good; None while all is well."""


@dataclass(frozen=True)
class Footprint:
    """Memory of one role's processes, for `/status`: produced by the cell."""

    private_bytes: int
    """Theirs alone."""
    shared_bytes: int
    """Mapped by others, too: the weights, and libraries."""


@dataclass(frozen=True)
class Stage:
    """One stage of the boot, with the seconds it took or has taken so far."""

    name: str
    seconds: float
    is_done: bool


@dataclass(frozen=True)
class CellReport:
    """What the cell knows of itself: produced by the cell, consumed by the ingress and `up`."""

    pid: int
    state: CellState
    reason: str | None
    paths: CellPaths | None
    stages: tuple[Stage, ...]
    restarts: int
    boot: int
    """Number of this boot; changes with every restart of the cell."""
    engine: EngineReport | None = None
    trainer: TrainerReport | None = None
    checkpoint: CheckpointReport | None = None
    dream: DreamReport | None = None
    memory: dict[str, Footprint] = field(default_factory=dict)
    """By role, once it was looked at."""
