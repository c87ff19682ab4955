"""What a dream leaves: rounds and their items. Made by a round, kept by the store, shown by routes.

imagining --> training --> judging --> passed
    |             ^           |
    +--> empty    +- again ---+------> taken back      (and `failed`, with a reason)
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

RoundState = Literal["imagining", "training", "judging", "passed", "empty", "taken back", "failed"]
ENDED: frozenset[RoundState] = frozenset({"passed", "empty", "taken back", "failed"})
ItemKind = Literal["new", "rehearsal", "replay", "held_out"]


@dataclass(frozen=True)
class Item:
    """One situation with one answer, learned or not, and why."""

    id: str
    round_id: str
    behaviour: str
    kind: ItemKind
    situation: str
    answer: str
    is_kept: bool
    reason: str | None = None
    """Why it was dropped."""
    scenario: int = 0
    """Number of the scenario in its round."""
    memories: tuple[str, ...] = ()
    shown: float | None = None
    """Mean log-probability per token of the answer with the instruction in view, in nats."""
    hidden: float | None = None
    """The same without it."""

    @property
    def is_candidate(self) -> bool:
        """Whether it was answered with the instruction in view; answer 0 of a scenario was not."""
        return self.kind == "new" and not self.id.endswith("-0")

    @property
    def divergence(self) -> float | None:
        return None if self.shown is None or self.hidden is None else self.shown - self.hidden


@dataclass(frozen=True)
class Attempt:
    """One training of a round's items, and what the gate said."""

    learning_rate: float
    job_id: str
    loss_history: tuple[float, ...] = ()
    measured: dict[str, float] | None = None
    success: dict[str, float] | None = None
    faults: tuple[str, ...] = ()


@dataclass
class Round:
    """One dream; what is known of it so far."""

    id: str
    number: int
    behaviour: str
    created: float
    state: RoundState = "imagining"
    ended: float | None = None
    temperature: float = 1.0
    generation: int | None = None
    """What was durable when it began, so that there is something to go back to."""
    before: dict[str, float] | None = None
    """The gate's measurement before it."""
    success_before: dict[str, float] = field(default_factory=dict)
    attempts: list[Attempt] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    """Scenarios, candidates, kept ones, and what was dropped, by reason."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage, waiting for an idle machine not counted."""
    tokens: int = 0
    """Written and read by the model for it."""
    reason: str | None = None
    """Why it ended as it did, where that is not plain."""

    @property
    def is_ended(self) -> bool:
        return self.state in ENDED

    @property
    def num_steps(self) -> int:
        return sum(len(attempt.loss_history) for attempt in self.attempts)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Round":
        attempts = [
            Attempt(
                **{
                    **each,
                    "loss_history": tuple(each["loss_history"]),
                    "faults": tuple(each["faults"]),
                }
            )
            for each in row["attempts"]
        ]
        return cls(**{**row, "attempts": attempts})
