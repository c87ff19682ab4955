"""Owns what is durable of the weights: commits to the journal, publications, returns.

    every commit_every_s, POST /checkpoint, a clean stop
        -> hold the trainer -> copy weights and optimizer -> release -> journal
    every publish_every_s, on request, a clean stop -> newest generation into the public directory
    POST /rollback, POST /forget -> see `returns`

The trainer waits while memory is copied, and during a return; the engine never does. The journal is
the truth: whatever is cut short is found and finished, or forgotten, when it is opened again.
"""

import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import ray

from actors.calls import in_words
from actors.errors import CheckpointFailed, ReverieError
from actors.messages import Checkpoint, CheckpointReport, GenerationView, Verification
from actors.past import Drift, GenerationDetail
from actors.posted import CheckpointRequest
from actors.returns import Returns

if TYPE_CHECKING:
    from apollo.journal.chain import Generation

log = logging.getLogger(__name__)

KEEPING_INTERVAL_S: Final = 1.0
RETRY_S: Final = 10.0


class Checkpointer(Returns):
    """The only writer of the journal and of the public directory while a cell runs."""

    @ray.method
    def start(self) -> CheckpointReport:
        """Map the live weights read-only, open the journal, and begin to keep what is learned."""
        from apollo.journal.disk import RealDisk
        from apollo.journal.recovery import open_journal
        from apollo.weights.layout import WeightLayout
        from apollo.weights.memory import Mapping

        layout = WeightLayout.load(Path(self._paths.layout))
        self._tensors = Mapping(layout, is_writable=False).tensors()
        name = Path(self._paths.model_dir).name
        disk, threads = RealDisk(self._settings.home), self._settings.journal.threads
        self._journal = open_journal(disk, name, threads=threads).journal
        self._open_maps()
        self._public = self._journal.public.generation
        self._is_swap_atomic = self._journal.slots.can_exchange()
        threading.Thread(target=self._keep, name="keeping", daemon=True).start()
        return self._describe()

    @ray.method(concurrency_group="report")
    def report(self) -> CheckpointReport:
        """Which generation is durable and which is public; `reason` once it cannot go on."""
        return self._describe()

    @ray.method
    def commit(self, request: CheckpointRequest) -> Checkpoint:
        """Keep the live weights as a generation, and publish it if asked; durable when it returns.

        When nothing was learned since the last generation, that one is returned. Raises
        CheckpointFailed, with everything that was durable as it was.
        """
        with self._turn():
            made = self._commit()
            if request.publish:
                self._publish_made(made)
            return made

    def _publish_made(self, made: Checkpoint) -> None:
        try:
            with self._translated():
                self._publish()
        except CheckpointFailed as error:
            raise CheckpointFailed(
                f"generation {made.generation} is durable, but not public: {error}"
            ) from None

    @ray.method(concurrency_group="control")
    def history(self) -> list[GenerationView]:
        """All generations that can be returned to, newest first."""
        kept = self._journal.chain.generations
        return [_view(each, self._public) for each in reversed(kept)]

    @ray.method
    def show(self, generation: int) -> GenerationDetail:
        """What was learned in a generation; raises NotFound for one that is not kept."""
        from apollo.journal.drift import changes

        with self._turn():
            found = self._find(generation)
            parent = None if found.parent is None else self._journal.find(found.parent)
            version = found.weights_version
            since = version if parent is None else parent.weights_version
            return GenerationDetail(
                generation=_view(found, self._public),
                learned=self._ask(self._trainer.learned.remote(version, since)),
                drift=Drift(**changes(self._journal, generation)._asdict()),
                undone_after=found.undone_after,
                is_learned_again=found.is_learned_again,
                forgotten=found.forgotten,
            )

    @ray.method
    def verify(self) -> Verification:
        """Read all that is kept and compare every hash; takes the time of reading it."""
        from apollo.journal.scrub import scrub

        with self._turn():
            found = scrub(self._journal)
        copies = tuple(f"{each.directory}: {each.tensor}" for each in found.copies)
        return Verification(found.files, copies, found.lost, found.bytes_read)

    # Keeping, by the clock.

    def _keep(self) -> None:
        """Commit and publish what was learned, as often as the settings say."""
        while self._reason is None:
            time.sleep(KEEPING_INTERVAL_S if self._paused is None else RETRY_S)
            try:
                self._keep_what_is_due()
            except CheckpointFailed as error:
                log.warning("not published: %s", error)
            except ReverieError:
                continue  # The trainer is busy, or gone: the next look may find it.
            except Exception as error:
                self._reason = f"keeping ended: {in_words(error)}"

    def _keep_what_is_due(self) -> None:
        journal, now = self._settings.journal, time.monotonic()
        is_new = self._versions.weights_version != self._journal.newest.weights_version
        if not is_new:
            self._committed_at = now  # The time of changes counts, not that of rest.
        is_due = is_new and now - self._committed_at >= journal.commit_every_s
        if (is_due or self._paused is not None) and not self._is_on_trial():
            try:
                with self._turn():
                    self._commit()
            except CheckpointFailed as error:
                self._pause(str(error))
                return
            self._pause(None)
        if now - self._published_at >= journal.publish_every_s:
            self._published_at = now  # If it fails, the next try has its time.
            with self._turn():
                self._publish()

    def _is_on_trial(self) -> bool:
        """Whether the weights hold a dream that the gate has not judged: it comes to that."""
        with self._translated():
            return self._ask(self._trainer.report.remote()).on_trial is not None

    def _pause(self, why: str | None) -> None:
        """Let the trainer wait while nothing can be kept; None lets it go on."""
        if why != self._paused:
            with self._translated():
                self._ask(self._trainer.wait_for_room.remote(why))
            self._paused = why


def _view(each: "Generation", public: int) -> GenerationView:
    return GenerationView(
        generation=each.generation,
        kind=each.kind,
        parent=each.parent,
        weights_version=each.weights_version,
        created=each.created,
        size_bytes=each.segment.size,
        is_public=each.generation == public,
        has_optimizer=each.optimizer is not None,
        returns_to=each.returns_to,
        root=each.root,
    )
