"""The work of the checkpoint actor, under its lock: a commit, a publication, a hold on the trainer.

What is due when is `checkpoint`'s business, and where the weights go back to `returns`'s.
"""

import logging
import mmap
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ray
from ray.exceptions import RayError, RayTaskError

from actors import logs
from actors.calls import in_words
from actors.distribution import NOTHING
from actors.errors import CheckpointFailed, NotFound, OnTrial, ReverieError, Unavailable
from actors.events import Events
from actors.footprint import give_back, map_large_blocks
from actors.messages import CellPaths, Checkpoint, CheckpointReport, Hold
from actors.settings import Settings
from actors.versions import VersionCounter

if TYPE_CHECKING:
    from ray.actor import ActorProxy

    from actors.trainer import Trainer
    from apollo.journal.chain import Generation
    from apollo.journal.journal import Journal
    from apollo.journal.live import ChangedStaging, Staging
    from apollo.weights.change_maps import ChangeMaps

log = logging.getLogger(__name__)

RELEASE_TIMEOUT_S: Final = 30
ON_TRIAL: Final = (
    "what it taught is not kept before the gate has let it pass; try again when it has ended, or "
    "DELETE /dream"
)
MAX_UNPUBLISHED: Final = 16
"""Generations after the public one: each makes the next commit a little slower."""


class Keeper:
    """Holds the journal, open, and the live weights, mapped read-only."""

    def __init__(
        self, settings: Settings, paths: CellPaths, trainer: "ActorProxy[Trainer]"
    ) -> None:
        os.environ["OMP_NUM_THREADS"] = str(settings.journal.threads)
        map_large_blocks()
        self._settings = settings
        self._paths = paths
        self._trainer = trainer
        self._versions = VersionCounter(paths.versions)
        logs.configure(settings.logs, "checkpoint", lambda: self._versions.weights_version)
        self._events = Events(Path(paths.ledger).parent, "checkpoint")
        self._lock = threading.Lock()
        self._tensors: dict[str, Any] = {}
        self._maps: ChangeMaps | None = None
        self._noted_since: int | None = None
        """From which on `_maps` say what has changed; None: all must be copied."""
        self._journal: Journal
        self._public = 0
        self._is_swap_atomic = True
        self._last: Checkpoint | None = None
        self._commit_seconds = self._stall_seconds = NOTHING
        self._commit_bytes = 0
        self._changed_share: float | None = None
        self._published_at = time.monotonic()
        self._committed_at = time.monotonic()
        self._paused: str | None = None
        self._reason: str | None = None

    def __repr__(self) -> str:
        return f"checkpoint of {self._paths.model}"

    def _describe(self) -> CheckpointReport:
        newest = self._journal.newest
        return CheckpointReport(
            pid=os.getpid(),
            generation=newest.generation,
            weights_version=newest.weights_version,
            public_generation=self._public,
            is_swap_atomic=self._is_swap_atomic,
            last=self._last,
            changed_share=self._changed_share,
            commit_seconds=self._commit_seconds,
            stall_seconds=self._stall_seconds,
            commit_bytes=self._commit_bytes,
            paused=self._paused,
            reason=self._reason,
        )

    # Below, the lock is held.

    def _commit(self) -> Checkpoint:
        from apollo.journal.disk import DiskFull

        self._refuse_if_ended()
        begun, newest = time.monotonic(), self._journal.newest
        if self._versions.weights_version == newest.weights_version:
            return self._tell(newest, begun, 0.0)
        self._refuse_on_trial(self._ask(self._trainer.report.remote()).on_trial)
        staging = self._staging()
        held = time.monotonic()
        with self._held(with_optimizer=True) as hold:
            self._refuse_on_trial(hold.on_trial)  # It may have begun to learn just before.
            self._noted_since = None  # Until what is taken now is durable.
            staging.copy()
        stall = time.monotonic() - held
        with _bytes_of(self._paths.optimizer if hold.has_optimizer else None) as optimizer:
            made = self._journal.commit(
                staging.words(), hold.weights_version, optimizer, hold.optimizer_step
            )
        self._noted_since = made.generation
        self._committed_at = time.monotonic()
        self._last = self._tell(made, begun, stall)
        self._note_commit(self._last)
        if made.generation - self._public >= MAX_UNPUBLISHED:
            try:
                self._publish()
            except DiskFull as error:  # It is durable all the same.
                log.warning("not published: %s", error)
        return self._last

    def _open_maps(self) -> None:
        """Look at what the trainer notes, if it is to."""
        from apollo.weights.change_maps import ChangeMaps

        if self._settings.journal.moves == "changed":
            self._maps = ChangeMaps.open(Path(self._paths.changed))
            self._noted_since = self._maps.generation

    def _staging(self) -> "Staging | ChangedStaging":
        """What takes the live weights: the changes since the newest generation, if all are noted.

        A full copy clears the maps as well; after a return, and a commit that failed, it is due.
        """
        from apollo.journal.live import ChangedStaging, Staging

        if self._maps is not None and self._noted_since == self._journal.newest.generation:
            return ChangedStaging(self._tensors, self._maps)
        return Staging(self._tensors, self._maps)

    def _note_commit(self, made: Checkpoint) -> None:
        share = self._changed_share = self._share_of(made.generation)
        self._commit_seconds = self._commit_seconds.plus(made.seconds)
        self._stall_seconds = self._stall_seconds.plus(made.stall_seconds)
        self._commit_bytes += made.size_bytes
        self._events.note(
            "commit",
            generation=made.generation,
            version=made.weights_version,
            size_bytes=made.size_bytes,
            seconds=made.seconds,
            stall_seconds=made.stall_seconds,
            changed_share=None if share is None else round(share, 6),
        )

    def _share_of(self, generation: int) -> float | None:
        """What it changed; None if that cannot be read back, for it is durable all the same."""
        from apollo.journal.codec import CorruptDelta
        from apollo.journal.disk import DiskError
        from apollo.journal.drift import changes
        from apollo.journal.segment import SegmentDamaged

        try:
            found = changes(self._journal, generation)
        except (CorruptDelta, DiskError, OSError, SegmentDamaged) as error:
            log.warning("what generation %s changed is not known: %s", generation, error)
            return None
        return found.num_changed / found.num_elements

    def _refuse_on_trial(self, round_id: str | None) -> None:
        if round_id is not None:
            raise OnTrial(f"dream round {round_id} is on trial: {ON_TRIAL}")

    def _refuse_if_ended(self) -> None:
        """Nothing may follow what was cut short: the weights and the journal may not agree."""
        if self._reason is not None:
            raise Unavailable(f"{self._reason}; the cell restarts")

    def _publish(self) -> None:
        self._refuse_if_ended()
        self._public = self._journal.publish().generation
        self._published_at = time.monotonic()
        self._events.note("publication", generation=self._public)
        self._thin()

    def _thin(self) -> None:
        """Drop old generations, and those that nobody may return to; another time will do, too."""
        from apollo.journal.disk import DiskFull
        from apollo.journal.retention import Retention, thin

        keep = self._settings.journal
        ages = Retention(keep.keep_all_s, keep.keep_hourly_s, keep.max_age_s)
        try:
            forgotten = self._with_forgotten()
        except (RayError, ReverieError) as error:  # What was published is public all the same.
            log.warning("old generations stay until the next publication: %s", in_words(error))
            return
        try:
            damaged = thin(self._journal, time.time(), ages, forgotten).damaged
        except DiskFull as error:
            damaged = (str(error),)
        for reason in damaged:
            log.warning("old generations stay as they are: %s", reason)

    def _with_forgotten(self) -> set[int]:
        """Generations that have learned what is forgotten: nobody may return to them."""
        numbers = {g.weights_version: g.generation for g in self._journal.chain.generations}
        asked = self._trainer.holding_forgotten.remote(tuple(numbers))
        return {numbers[version] for version in self._ask(asked)}

    def _find(self, generation: int) -> "Generation":
        from apollo.journal.journal import UnknownGeneration

        try:
            return self._journal.find(generation)
        except UnknownGeneration as error:
            raise NotFound(f"{error}; see GET /checkpoints").about("generation") from None

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
    def _turn(self) -> Iterator[None]:
        """One at a time; what its work has freed is given back, whatever came of it."""
        with self._lock, self._translated():
            try:
                yield
            finally:
                give_back()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """The journal's and Ray's errors as ours; one that leaves the disk unsure ends the cell."""
        from apollo.journal.codec import CorruptDelta
        from apollo.journal.disk import DiskError, DiskFailed
        from apollo.journal.image import ImageError
        from apollo.journal.segment import SegmentDamaged
        from apollo.journal.slots import SlotDamaged
        from apollo.journal.values import WeightsDamaged
        from apollo.weights.manifest import ManifestError

        damages = (CorruptDelta, ManifestError, SegmentDamaged, SlotDamaged, WeightsDamaged)
        try:
            yield
        except ReverieError:
            raise
        except RayTaskError as error:
            if isinstance(error.cause, ReverieError):
                raise error.cause from None
            raise
        except RayError:  # Before OSError, which a timeout of Ray's also is.
            raise Unavailable(
                "the trainer does not answer; GET /checkpoints says what is durable"
            ) from None
        except DiskFailed as error:
            self._reason = f"the disk failed: {error}"
            raise CheckpointFailed(f"{error}; the cell restarts from what is durable") from None
        except (DiskError, ImageError, OSError, *damages) as error:
            words = error.strerror if isinstance(error, OSError) else str(error)
            raise CheckpointFailed(
                f"{words}; what was kept before is unchanged: free some space or mend the cause, "
                "and post it again"
            ) from None


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
