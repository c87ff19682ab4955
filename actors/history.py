"""What the ledger tells of the past: what was learned between two versions."""

from typing import Final

from actors.past import Learned, LearnedItem
from actors.trials import Trials

MAX_ITEMS: Final = 1000
"""Most items that are told of one generation; the reply stays small."""


class History(Trials):
    """Reads; changes nothing."""

    def learned(self, version: int, since: int) -> Learned:
        """What the weights of `version` have learned that those of `since` have not.

        Of an undone generation too. Nothing for a return, which learns nothing.
        """
        with self._lock:
            steps = self._made(self._spans(version, since))
            by_item: dict[str, list[tuple[str, float]]] = {}
            for step in steps:
                by_item.setdefault(step["sample_id"], []).append((step["job_id"], step["loss"]))
            items = tuple(
                self._item(sample_id, made) for sample_id, made in list(by_item.items())[:MAX_ITEMS]
            )
        losses = [step["loss"] for step in steps]
        return Learned(
            items=items,
            num_items=len(by_item),
            num_steps=len(losses),
            first_loss=losses[0] if losses else None,
            last_loss=losses[-1] if losses else None,
            mean_loss=sum(losses) / len(losses) if losses else None,
        )

    def _item(self, sample_id: str, made: list[tuple[str, float]]) -> LearnedItem:
        row = self._row("SELECT source, position FROM samples WHERE id = ?", sample_id)
        return LearnedItem(
            id=sample_id,
            job_id=made[0][0],
            source=None if row is None else row["source"],
            position=None if row is None else row["position"],
            is_forgotten=row is None,
            num_steps=len(made),
            first_loss=made[0][1],
            last_loss=made[-1][1],
        )
