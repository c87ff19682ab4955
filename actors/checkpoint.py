"""Owns what is durable of the weights: commits to the journal, publications, returns.

    every commit_every_s, POST /checkpoint, a clean stop
        -> hold the trainer -> copy weights and optimizer -> release -> journal
    every publish_every_s, on request, a clean stop -> newest generation into the public directory
    POST /rollback -> hold -> a generation that leads back -> publish -> trainer reads it -> release

The trainer waits while memory is copied, and during a return; the engine never does. The journal is
the truth: whatever is cut short is found and finished, or forgotten, when it is opened again.
"""

import logging
import mmap
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from actors.calls import in_words
from actors.errors import CheckpointFailed, NotFound, ReverieError, Unavailable
from actors.messages import (
    CellPaths,
    Checkpoint,
    CheckpointReport,
    GenerationView,
    Hold,
    Return,
    TakeBack,
    Verification,
)
from actors.posted import CheckpointRequest, RollbackRequest
from actors.settings import Settings
from actors.versions import VersionCounter

if TYPE_CHECKING:
    from ray.actor import ActorProxy

    from actors.trainer import Trainer
    from apollo.journal.chain import Generation
    from apollo.journal.journal import Journal

log = logging.getLogger(__name__)

RELEASE_TIMEOUT_S: Final = 30
KEEPING_INTERVAL_S: Final = 1.0
RETRY_S: Final = 10.0
ON_TRIAL: Final = "what it taught is not kept before the gate has let it pass; try again later"
MAX_UNPUBLISHED: Final = 16
"""Generations after the public one: each makes the next commit a little slower."""

T = TypeVar("T")


class OnTrial(Unavailable):
    """The live weights hold a dream round that has not passed the gate."""


class Checkpointer:
    """The only writer of the journal and of the public directory while a cell runs."""

    def __init__(
        self, settings: Settings, paths: CellPaths, trainer: "ActorProxy[Trainer]"
    ) -> None:
        os.environ["OMP_NUM_THREADS"] = str(settings.journal.threads)
        self._settings = settings
        self._paths = paths
        self._trainer = trainer
        self._versions = VersionCounter(paths.versions)
        self._lock = threading.Lock()
        self._tensors: dict[str, Any] = {}
        self._journal: Journal
        self._public = 0
        self._is_swap_atomic = True
        self._last: Checkpoint | None = None
        self._published_at = time.monotonic()
        self._committed_at = time.monotonic()
        self._paused: str | None = None
        self._reason: str | None = None

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
        self._journal = open_journal(RealDisk(self._settings.home), name).journal
        self._public = self._journal.public.generation
        self._is_swap_atomic = self._journal.slots.can_exchange()
        threading.Thread(target=self._keep, name="keeping", daemon=True).start()
        return self._describe()

    @ray.method(concurrency_group="report")
    def report(self) -> CheckpointReport:
        """Which generation is durable and which is public; `reason` once it cannot go on."""
        return self._describe()

    def _describe(self) -> CheckpointReport:
        newest = self._journal.newest
        return CheckpointReport(
            pid=os.getpid(),
            generation=newest.generation,
            weights_version=newest.weights_version,
            public_generation=self._public,
            is_swap_atomic=self._is_swap_atomic,
            last=self._last,
            paused=self._paused,
            reason=self._reason,
        )

    @ray.method
    def commit(self, request: CheckpointRequest) -> Checkpoint:
        """Keep the live weights as a generation, and publish it if asked; durable when it returns.

        When nothing was learned since the last generation, that one is returned. Raises
        CheckpointFailed, with everything that was durable as it was.
        """
        with self._lock, self._translated():
            made = self._commit()
            if request.publish:
                self._publish()
            return made

    @ray.method
    def roll_back(self, request: RollbackRequest) -> Checkpoint:
        """Make the weights of an earlier generation the live ones, as a new generation.

        What was learned since is undone. Raises NotFound for one that is not kept, CheckpointFailed
        with nothing changed, Unavailable if it was cut short: it is durable then, and the cell
        restarts with it.
        """
        return self._return_to(request.generation)

    @ray.method
    def take_back(self, request: TakeBack) -> Checkpoint:
        """As `roll_back`, but what was learned since is learned again, besides these samples."""
        return self._return_to(
            request.generation, is_learned_again=True, forgotten=request.sample_ids
        )

    def _return_to(self, generation: int, **how: Any) -> Checkpoint:
        from apollo.journal.journal import UnknownGeneration

        begun = time.monotonic()
        with self._lock, self._translated():
            try:
                self._journal.find(generation)
            except UnknownGeneration as error:
                raise NotFound(f"{error}; see GET /checkpoints").about("generation") from None
            with suppress(OnTrial):  # It is undone with the rest.
                self._commit()  # So that there is a way back from this, too.
            held = time.monotonic()
            # Inside, so that a disk that failed is known before the trainer could be let go.
            with self._held(with_optimizer=False) as hold, self._translated():
                made = self._journal.roll_back(generation, hold.next_version, **how)
                self._finish_return(generation, made, hold)
        return self._tell(made, begun, time.monotonic() - held)

    def _finish_return(self, generation: int, made: "Generation", hold: Hold) -> None:
        """It is durable already: whatever goes wrong from here on, a restart finishes it."""
        try:
            self._journal.publish()
            restoring = self._trainer.restore.remote(Return(hold.token, made.weights_version))
            self._ask(restoring, self._settings.cell.checkpoint_timeout_s)
        except Exception as error:
            log.warning("a return was cut short: %s", in_words(error))
            self._reason = f"the return to generation {generation} was cut short"
            self._refuse_if_ended()
        self._public = made.generation
        self._published_at = self._committed_at = time.monotonic()

    @ray.method(concurrency_group="control")
    def history(self) -> list[GenerationView]:
        """All generations that can be returned to, newest first."""
        kept = self._journal.chain.generations
        return [_view(each, self._public) for each in reversed(kept)]

    @ray.method
    def verify(self) -> Verification:
        """Read all that is kept and compare every hash; takes the time of reading it."""
        from apollo.journal.scrub import scrub

        with self._lock, self._translated():
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
                with self._lock, self._translated():
                    self._commit()
            except CheckpointFailed as error:
                self._pause(str(error))
                return
            self._pause(None)
        if now - self._published_at >= journal.publish_every_s:
            self._published_at = now  # If it fails, the next try has its time.
            with self._lock, self._translated():
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

    # The work, under the lock.

    def _commit(self) -> Checkpoint:
        from apollo.journal.live import Staging

        self._refuse_if_ended()
        begun, newest = time.monotonic(), self._journal.newest
        if self._versions.weights_version == newest.weights_version:
            return self._tell(newest, begun, 0.0)
        staging = Staging(self._tensors)
        held = time.monotonic()
        with self._held(with_optimizer=True) as hold:
            if hold.on_trial is not None:
                raise OnTrial(f"dream round {hold.on_trial} is on trial: {ON_TRIAL}")
            staging.copy()
        stall = time.monotonic() - held
        with _bytes_of(self._paths.optimizer if hold.has_optimizer else None) as optimizer:
            made = self._journal.commit(
                staging.words(), hold.weights_version, optimizer, hold.optimizer_step
            )
        self._committed_at = time.monotonic()
        self._last = self._tell(made, begun, stall)
        if made.generation - self._public >= MAX_UNPUBLISHED:
            self._publish()
        return self._last

    def _refuse_if_ended(self) -> None:
        """Nothing may follow what was cut short: the weights and the journal may not agree."""
        if self._reason is not None:
            raise Unavailable(f"{self._reason}; the cell restarts")

    def _publish(self) -> None:
        from apollo.journal.retention import Retention, thin

        self._refuse_if_ended()
        self._public = self._journal.publish().generation
        self._published_at = time.monotonic()
        keep = self._settings.journal
        ages = Retention(keep.keep_all_s, keep.keep_hourly_s, keep.max_age_s)
        for reason in thin(self._journal, time.time(), ages).damaged:
            log.warning("old generations stay as they are: %s", reason)

    def _tell(self, made: "Generation", begun: float, stall: float) -> Checkpoint:
        return Checkpoint(
            generation=made.generation,
            weights_version=made.weights_version,
            created=made.created,
            size_bytes=made.segment.size,
            seconds=round(time.monotonic() - begun, 3),
            stall_seconds=round(stall, 3),
        )

    @contextmanager
    def _held(self, *, with_optimizer: bool) -> Iterator[Hold]:
        """The trainer stands between two steps; raises if it moved before the end all the same."""
        limit = self._settings.trainer.step_timeout_s + RELEASE_TIMEOUT_S
        token, is_intact = secrets.token_hex(8), True
        try:
            yield self._ask(self._trainer.hold.remote(token, with_optimizer), limit)
        finally:
            # After a return that was cut short the trainer must not step again before the restart.
            if self._reason is None:
                is_intact = self._ask(self._trainer.release.remote(token))
        if not is_intact:
            raise CheckpointFailed("nothing was kept: the trainer moved on meanwhile")

    def _ask(self, call: Any, timeout_s: float = RELEASE_TIMEOUT_S) -> Any:
        return ray.get(call, timeout=timeout_s)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """The journal's and Ray's errors as ours; one that leaves the disk unsure ends the cell."""
        from apollo.journal.disk import DiskError, DiskFailed
        from apollo.journal.image import ImageError
        from apollo.journal.segment import SegmentDamaged
        from apollo.journal.slots import SlotDamaged
        from apollo.journal.values import WeightsDamaged

        damages = (SegmentDamaged, SlotDamaged, WeightsDamaged)
        try:
            yield
        except ReverieError:
            raise
        except RayTaskError as error:
            if isinstance(error.cause, ReverieError):
                raise error.cause from None
            raise
        except RayError:  # Before OSError, which a timeout of Ray's also is.
            raise Unavailable("the trainer does not answer; nothing was kept") from None
        except DiskFailed as error:
            self._reason = f"the disk failed: {error}"
            raise CheckpointFailed(f"{error}; the cell restarts from what is durable") from None
        except (DiskError, ImageError, OSError, *damages) as error:
            words = error.strerror if isinstance(error, OSError) else str(error)
            raise CheckpointFailed(
                f"{words}; what was kept before is unchanged: free some space or mend the cause, "
                "and post it again"
            ) from None


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


@contextmanager
def _bytes_of(path: str | None) -> Iterator[memoryview | None]:
    """A file's bytes, mapped; the file is removed afterwards."""
    if path is None:
        yield None
        return
    with open(path, "rb") as file:
        # Not closed by us: the traceback of a full disk still holds views of it.
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    try:
        yield memoryview(mapped)
    finally:
        os.unlink(path)
