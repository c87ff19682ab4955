"""Owns what is durable of the weights: writes the live ones out and publishes them atomically.

    hold the trainer between two steps -> write a hidden directory -> read it back -> release
        -> generation and version into its manifest -> swap it with the public directory

The trainer waits while the weights are written; the engine never does.
"""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ray
from ray.exceptions import RayError, RayTaskError

from actors.errors import CheckpointFailed, ReverieError, Unavailable
from actors.messages import CellPaths, Checkpoint, CheckpointReport
from actors.settings import Settings

if TYPE_CHECKING:
    from ray.actor import ActorProxy

    from actors.trainer import Trainer

RELEASE_TIMEOUT_S: Final = 30


class Checkpointer:
    """The only writer of the public directory while a cell runs."""

    def __init__(
        self, settings: Settings, paths: CellPaths, trainer: "ActorProxy[Trainer]"
    ) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        self._settings = settings
        self._public = Path(paths.model_dir)
        self._hidden = self._public.with_name(f".{self._public.name}.next")
        self._layout_path = Path(paths.layout)
        self._trainer = trainer
        self._tensors: dict[str, Any] = {}
        self._last: Checkpoint | None = None

    @ray.method
    def start(self) -> CheckpointReport:
        """Map the live weights read-only and read which generation is public."""
        from apollo.weights.layout import WeightLayout
        from apollo.weights.memory import Mapping

        layout = WeightLayout.load(self._layout_path)
        self._tensors = Mapping(layout, is_writable=False).tensors()
        return self._describe()

    @ray.method(concurrency_group="report")
    def report(self) -> CheckpointReport:
        """Which generation is public."""
        return self._describe()

    def _describe(self) -> CheckpointReport:
        from apollo.weights import manifest

        public = manifest.require(self._public)
        return CheckpointReport(os.getpid(), public.generation, public.weights_version)

    @ray.method
    def commit(self) -> Checkpoint:
        """Publish the live weights as a new generation; durable when it returns.

        Blocks the trainer (not the engine) while the weights are written. When nothing was learned
        since the last generation, that one is returned. Raises CheckpointFailed, with the public
        directory as it was.
        """
        from apollo.weights.snapshot import SnapshotError

        begun = time.monotonic()
        try:
            return self._commit(begun)
        except ReverieError:
            raise
        except RayTaskError as error:
            if isinstance(error.cause, ReverieError):
                raise error.cause from None
            raise
        except RayError:  # Before OSError, which a timeout of Ray's also is.
            raise Unavailable("the trainer does not answer; nothing was published") from None
        except (OSError, SnapshotError) as error:
            raise CheckpointFailed(
                f"nothing was published: {_words(error)}; what is served is unchanged, free some "
                "space or mend the cause and post the checkpoint again"
            ) from None

    def _commit(self, begun: float) -> Checkpoint:
        from apollo.weights import manifest, snapshot

        public = manifest.require(self._public)
        snapshot.empty_directory(self._hidden)
        hold = ray.get(
            self._trainer.hold.remote(),
            timeout=self._settings.trainer.step_timeout_s + RELEASE_TIMEOUT_S,
        )
        held = time.monotonic()
        try:
            if hold.weights_version == public.weights_version:
                return Checkpoint(
                    public.generation,
                    public.weights_version,
                    public.created,
                    sum(public.files.values()),
                )
            size_bytes = snapshot.write_weights(self._tensors, self._public, self._hidden)
            snapshot.verify_weights(self._tensors, self._hidden)
        finally:
            is_intact = ray.get(self._trainer.release.remote(hold.token), timeout=RELEASE_TIMEOUT_S)
        stall = time.monotonic() - held
        if not is_intact:
            raise CheckpointFailed(
                "nothing was published: the trainer moved on while it was written"
            )
        snapshot.copy_rest(self._public, self._hidden, excluded=(manifest.FILE_NAME,))
        made = replace(
            public,
            generation=public.generation + 1,
            weights_version=hold.weights_version,
            created=time.time(),
            files=manifest.sizes(self._hidden),
        )
        manifest.write(self._hidden, made)
        snapshot.exchange(self._hidden, self._public)
        return Checkpoint(
            generation=made.generation,
            weights_version=made.weights_version,
            created=made.created,
            size_bytes=size_bytes,
            seconds=round(time.monotonic() - begun, 3),
            stall_seconds=round(stall, 3),
        )


def _words(error: Exception) -> str:
    """The cause without the machine's paths."""
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)
