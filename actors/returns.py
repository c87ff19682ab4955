"""Where the live weights go back to: a generation on request, or one from before some samples.

    POST /rollback  -> commit -> hold -> a generation that leads back -> publish -> trainer reads it
    POST /forget    -> hold -> is it in the weights?
                         no:  it is taken out of the ledger
                         yes: as above, to the newest from before it, without a commit;
                              what else was learned since is queued again

A generation that leads back names what is forgotten, and the ledger follows it: see `recall`. So
forgetting is done once its manifest is on disk, whatever ends the cell after that.
"""

import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import ray

from actors.calls import in_words
from actors.errors import Conflict, NotFound, OnTrial
from actors.keeper import Keeper
from actors.messages import Checkpoint, Hold, Return, TakeBack
from actors.past import Forgotten, Remembered, Removal
from actors.posted import ForgetRequest, RollbackRequest

if TYPE_CHECKING:
    from apollo.journal.chain import Generation

log = logging.getLogger(__name__)


class Returns(Keeper):
    """Every method waits for its turn, and lets the trainer wait while it works."""

    @ray.method
    def roll_back(self, request: RollbackRequest) -> Checkpoint:
        """Make the weights of an earlier generation the live ones, as a new generation.

        What was learned since is undone. Raises NotFound for one that is not kept, Conflict for one
        that knows what is forgotten, CheckpointFailed with nothing changed, Unavailable if it was
        cut short: it is durable then, and the cell restarts with it.
        """
        begun = time.monotonic()
        with self._turn():
            goal = self._find(request.generation)
            if self._ask(self._trainer.holding_forgotten.remote((goal.weights_version,))):
                raise Conflict(
                    f"generation {goal.generation} has learned what is forgotten; return to one "
                    f"whose items, in GET /checkpoints/{goal.generation}, are not"
                ).about("generation")
            with suppress(OnTrial):  # It is undone with the rest.
                self._commit()  # So that there is a way back from this, too.
            held = time.monotonic()
            # Inside, so that a disk that failed is known before the trainer could be let go.
            with self._held(with_optimizer=False) as hold, self._translated():
                made = self._journal.roll_back(goal.generation, hold.next_version)
                self._finish_return(goal, made, hold)
        return self._tell(made, begun, time.monotonic() - held)

    @ray.method
    def forget(self, request: ForgetRequest) -> Forgotten:
        """Undo what was learned of one sample and never learn it again; all others stay.

        Durable when it returns; others may be learning again by then. Raises NotFound for a sample
        that nobody knows, Conflict if nothing from before it is kept, else as `roll_back`.
        """
        with self._turn():
            found, hold, made = self._without((request.item,), is_dream=False)
        if made is None:
            return Forgotten(request.item, hold.weights_version)
        return Forgotten(
            item=request.item,
            weights_version=made.weights_version,
            generation=made.generation,
            returned_to=made.returns_to,
            undone_jobs=found.jobs,
            undone_steps=found.num_steps,
            steps_to_learn_again=found.num_again,
            samples_to_learn_again=found.num_samples_again,
            steps_lost=found.num_lost,
            has_optimizer=made.optimizer is not None,
        )

    @ray.method
    def take_back(self, request: TakeBack) -> None:
        """Forget what a dream has taught; a second call changes nothing."""
        with self._turn():
            self._without(request.sample_ids, is_dream=True)

    def _without(
        self, sample_ids: tuple[str, ...], *, is_dream: bool
    ) -> "tuple[Remembered, Hold, Generation | None]":
        """Forget; the new generation, if it takes one."""
        self._refuse_if_ended()
        generations = {each.weights_version: each for each in self._journal.chain.generations}
        with self._held(with_optimizer=False) as hold, self._translated():
            if hold.on_trial is not None and not is_dream:
                raise OnTrial(
                    f"dream round {hold.on_trial} is on trial, and would be judged by weights that "
                    "are not its own; try again when it has ended, or DELETE /dream"
                )
            asked = self._trainer.remembered.remote(sample_ids, tuple(generations))
            found: Remembered = self._ask(asked)
            if found.missing is not None and not is_dream:
                raise NotFound(found.missing).about("item")
            if not found.is_learned:
                self._ask(self._trainer.remove.remote(Removal(hold.token, sample_ids)))
                return found, hold, None
            if found.clean_version is None:
                oldest = self._journal.chain.generations[0].generation
                raise Conflict(
                    f"no generation from before {sample_ids[0]!r} was learned is kept, the oldest "
                    f"is {oldest}; nothing was forgotten: adopt the model anew"
                ).about("item")
            goal = generations[found.clean_version]
            made = self._journal.roll_back(
                goal.generation, hold.next_version, is_learned_again=True, forgotten=sample_ids
            )
            self._finish_return(goal, made, hold)
        return found, hold, made

    def _finish_return(self, goal: "Generation", made: "Generation", hold: Hold) -> None:
        """It is durable already: whatever goes wrong from here on, a restart finishes it."""
        try:
            self._journal.publish()
            restoring = self._trainer.restore.remote(Return(hold.token, made.weights_version))
            self._ask(restoring, self._settings.cell.checkpoint_timeout_s)
        except Exception as error:
            log.warning("a return was cut short: %s", in_words(error))
            self._reason = f"the return to generation {goal.generation} was cut short"
            self._refuse_if_ended()
        self._events.note(
            "forgotten" if made.is_learned_again else "rollback",
            generation=made.generation,
            returns_to=goal.generation,
            version=made.weights_version,
        )
        self._public = made.generation
        self._published_at = self._committed_at = time.monotonic()
