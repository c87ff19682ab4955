"""Frozen records of what was learned, and of what is forgotten, that cross a process boundary."""

from dataclasses import dataclass

from actors.messages import GenerationView


@dataclass(frozen=True)
class LearnedItem:
    """One sample in a generation, without its text."""

    id: str
    job_id: str
    source: str | None
    position: int | None
    """Its place in its job; None once it is forgotten."""
    is_forgotten: bool
    num_steps: int
    first_loss: float
    last_loss: float


@dataclass(frozen=True)
class Learned:
    """What was learned between two versions: produced by the trainer, from the ledger."""

    items: tuple[LearnedItem, ...]
    """In the order of their first steps; the first ones, if there are very many."""
    num_items: int
    num_steps: int
    first_loss: float | None
    last_loss: float | None
    mean_loss: float | None


@dataclass(frozen=True)
class Drift:
    """How far a generation's weights are from its parent's: read from its segment's headers."""

    num_elements: int
    num_changed: int
    """Of a chunk of weights most of which changed, every element is counted."""
    num_tensors: int
    """Tensors of which something changed."""


@dataclass(frozen=True)
class GenerationDetail:
    """One generation and what was learned in it: produced by the checkpoint actor."""

    generation: GenerationView
    learned: Learned
    drift: Drift
    undone_after: int | None
    """Of a return: steps of versions after this one, and before its own, were undone."""
    is_learned_again: bool
    """Of a return: what it undid was queued again, except `forgotten`."""
    forgotten: tuple[str, ...]


@dataclass(frozen=True)
class Remembered:
    """What forgetting some samples takes: produced by the trainer, for the checkpoint actor."""

    missing: str | None = None
    """Why one of them is not there, in words."""
    is_learned: bool = False
    """Whether they are in the live weights."""
    clean_version: int | None = None
    """The newest to return to that does not know them; None if there is none, or no need."""
    jobs: tuple[str, ...] = ()
    num_steps: int = 0
    """Steps since that version, theirs and all others'."""
    num_again: int = 0
    """Steps that are to be learned again."""
    num_samples_again: int = 0
    num_lost: int = 0
    """Others' steps that are not: a return had undone them, and a later one brought them back."""


@dataclass(frozen=True)
class Removal:
    """Samples to remove that are not in the live weights: by the checkpoint actor, to the trainer,
    under the hold that it names."""

    token: str
    sample_ids: tuple[str, ...]


@dataclass(frozen=True)
class Forgotten:
    """Answer to `POST /forget`: the item is forgotten durably."""

    item: str
    weights_version: int
    generation: int | None = None
    """The new one, without it; None if it was not in the weights."""
    returned_to: int | None = None
    undone_jobs: tuple[str, ...] = ()
    undone_steps: int = 0
    steps_to_learn_again: int = 0
    samples_to_learn_again: int = 0
    steps_lost: int = 0
    """Of others, that are not learned again: see `Remembered.num_lost`."""
    has_optimizer: bool | None = None
    """Whether learning goes on with the moments of the generation returned to."""
