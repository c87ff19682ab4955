"""What the training thread has done last, for the trainer's report."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actors.distribution import NOTHING, Distribution

if TYPE_CHECKING:
    from apollo.learning.step import StepReport


@dataclass
class Progress:
    """Fields of a TrainerReport; written by the training thread, read by any."""

    job_id: str | None = None
    steps: int = 0
    last_loss: float | None = None
    last_step_s: float | None = None
    last_rested_s: float | None = None
    last_parts: dict[str, float] = field(default_factory=dict)
    last_update_rms: float | None = None
    last_changed: float | None = None
    last_limited: int | None = None
    last_step_bytes: int | None = None
    step_seconds: Distribution = NOTHING
    learned_tokens: int = 0

    def note(self, steps: int, report: "StepReport", seconds: float, tokens: int) -> None:
        """A step was made, and recorded."""
        self.steps, self.last_loss, self.last_step_s = steps, report.loss, seconds
        self.last_rested_s = report.rested_s
        self.last_parts = {
            str(part): round(each, 4) for part, each in report.parts.items() if part != "rested"
        }
        self.last_update_rms, self.last_changed = report.update_rms, report.changed
        self.last_limited, self.last_step_bytes = report.num_limited, report.peak_bytes
        self.step_seconds = self.step_seconds.plus(seconds)
        self.learned_tokens += tokens

    def as_fields(self) -> dict[str, Any]:
        return dict(vars(self))
