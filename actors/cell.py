"""Composition root of one cell: placement, boot order, supervision, shutdown.

    who            waits for        at boot                 when it dies
    engine         the model        loads, writes layout    the whole cell restarts
    trainer        layout           attaches, recovers      these three restart, the engine answers
    checkpoint     layout, trainer  maps read-only          these three
    dream          all of them      goes on with its round  these three
    this           nobody           holds the locks         Ray restarts it, the cell restarts

The weights live in the engine process's shared memory, half a step may be in them when any process
dies, and the ledger knows which steps the public directory holds. So there is one recovery for
everything: end what is left, mend the journal, and begin again from the public directory, which is
loaded by a new engine, or written into the memory of one that is well. That one goes on answering
meanwhile, as it does while any step is written.
"""

import asyncio
import os
import time
from collections import deque
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import psutil
import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from actors import logs, run_dir
from actors.adopting import adopt_model
from actors.calls import in_words, within
from actors.draining import drain
from actors.ending import AROUND, CELL, NAMESPACE, ROLES, alive, evict, wait_or_kill
from actors.errors import BootFailed
from actors.events import Events
from actors.footprint import by_role, pids_of
from actors.messages import CellPaths, CellReport, CellState, Footprint, Stage
from actors.placing import create_actors, has_gpu, take_place
from actors.posted import CheckpointRequest
from actors.settings import Settings
from actors.traffic import Traffic
from actors.versions import VersionCounter
from apollo.weights.adopt import model_name
from apollo.weights.manifest import make_directory

START_TIMEOUT_S: Final = 60
ENGINE_STOP_TIMEOUT_S: Final = 20
ADOPT_TIMEOUT_S: Final = 3600
RESTART_PAUSE_S: Final = 0.5
WEIGH_INTERVAL_S: Final = 10.0
"""The kernel walks all pages of a process to add them up: 10 ms and more for 700 MiB."""
ENGINE_STAGES: Final = ("weights", "layout", "engine")

T = TypeVar("T")


def connect(settings: Settings) -> Any:
    """The handle of the one cell of this Ray cluster, which is started if there is none."""
    cell = ray.remote(Cell)
    return cell.options(
        name=CELL,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
    ).remote(settings)


class Cell:
    """Boots the four actors, watches them, and boots them again when one dies."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._state: CellState = "starting"
        self._reason: str | None = None
        self._stages: list[Stage] = []
        self._restarts: deque[float] = deque()
        self._num_restarts = 0
        self._boot_number = int(time.time())  # Unlike any of an earlier life of this actor.
        self._has_run = False
        self._children: dict[str, list[psutil.Process]] = {}
        """By role, all that were ever reported of this boot."""
        self._paths: CellPaths | None = None
        self._actors: dict[str, Any] = {}
        self._reports: dict[str, Any] = {}
        self._memory: dict[str, Footprint] = {}
        self._group: PlacementGroup | None = None
        self._locks: list[int] = []
        self._events: Events | None = None
        logs.configure(settings.logs, "cell", lambda: None)
        self._run: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[str] | None = None

    def __repr__(self) -> str:
        return f"cell of {self._settings.model.rpartition('/')[2]}"

    @ray.method
    async def start(self) -> None:
        """Begin to boot, in the background; a second call changes nothing."""
        self._begin()

    def _begin(self) -> None:
        if self._run is None:
            self._has_run = ray.get_runtime_context().was_current_actor_reconstructed
            self._run = asyncio.create_task(self._supervise())
            self._run.add_done_callback(self._ended_unasked)

    def _ended_unasked(self, run: asyncio.Task[None]) -> None:
        if not run.cancelled() and run.exception() is not None:
            self._state, self._reason = "failed", f"supervision ended: {run.exception()}"

    @ray.method
    async def report(self) -> CellReport:
        """State, stages and the last known reports of the four actors."""
        self._begin()
        return CellReport(
            pid=os.getpid(),
            state=self._state,
            reason=self._reason,
            paths=self._paths,
            stages=tuple(self._stages),
            restarts=self._num_restarts,
            boot=self._boot_number,
            memory=self._memory,
            **{role: self._reports.get(role) for role in ROLES},
        )

    @ray.method
    async def stop(self) -> str:
        """Stop in order: no further steps, a last checkpoint, the engine, everything else.

        Answers that have begun may end meanwhile, within `cell.drain_timeout_s`; the door answers
        503 to new requests. Returns what became of the checkpoint, in words; whoever asks while it
        stops already is told the same.
        """
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        return await asyncio.shield(self._stopping)

    async def _stop(self) -> str:
        was_ready = self._state == "ready"
        self._state, self._reason = "stopping", "it was asked to stop"
        if self._run is not None:
            self._run.cancel()
            await asyncio.wait([self._run], timeout=5)
        note = "nothing to save"
        if was_ready:
            assert self._paths is not None
            draining = drain(self._paths.traffic, self._settings.cell.drain_timeout_s)
            note, _ = await asyncio.gather(self._save(), draining)
            await self._ended(self._actors["engine"].stop.remote(), ENGINE_STOP_TIMEOUT_S)
        await self._tear_down(ROLES)
        self._tell("stop", saved=note)
        for lock in self._locks:
            os.close(lock)
        self._locks.clear()
        return note

    async def _save(self) -> str:
        cell = self._settings.cell
        try:
            await within(
                self._actors["trainer"].pause.remote(), self._settings.trainer.step_timeout_s
            )
            saved = await within(
                self._actors["checkpoint"].commit.remote(CheckpointRequest()),
                cell.checkpoint_timeout_s,
            )
            return f"generation {saved.generation} at version {saved.weights_version}"
        except Exception as error:
            return f"no checkpoint: {in_words(error)}; the ledger will queue again what is missing"

    # Supervision.

    async def _supervise(self) -> None:
        keeps_engine = False
        while True:
            self._boot_number += 1
            try:
                await (self._boot_around() if keeps_engine else self._boot())
                self._state, self._reason, self._has_run = "ready", None, True
                took = sum(stage.seconds for stage in self._stages)
                self._tell("boot", boot=self._boot_number, seconds=round(took, 1))
                why = await self._watch()
                self._state = "recovering"
                keeps_engine = await self._is_engine_well()
            except asyncio.CancelledError:
                raise
            except Exception as error:
                why, keeps_engine = in_words(error), False
            why = why.replace(str(self._settings.home), "REVERIE_HOME")
            self._state, self._reason = "recovering", why
            self._tell("recovery", boot=self._boot_number, reason=why, keeps_engine=keeps_engine)
            await self._tear_down(AROUND if keeps_engine else ROLES)
            if not self._may_restart():
                self._state = "failed"
                self._reason = f"{why} (gave up after {len(self._restarts) - 1} restarts)"
                self._tell("failed", boot=self._boot_number)
                return
            await asyncio.sleep(RESTART_PAUSE_S)

    def _tell(self, event: str, **facts: Any) -> None:
        if self._events is not None:
            self._events.note(event, **facts)

    def _may_restart(self) -> bool:
        cell, now = self._settings.cell, time.monotonic()
        self._restarts.append(now)
        self._num_restarts += 1
        while self._restarts and now - self._restarts[0] > cell.restart_window_s:
            self._restarts.popleft()
        return len(self._restarts) <= cell.max_restarts and self._has_run

    async def _watch(self) -> str:
        """Wait until something is wrong with one of the four; returns what."""
        watchers = [asyncio.create_task(self._watch_one(role)) for role in ROLES]
        weighing = asyncio.create_task(self._weigh())
        try:
            done, _ = await asyncio.wait(watchers, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for task in (*watchers, weighing):
                task.cancel()

    async def _watch_one(self, role: str) -> str:
        cell = self._settings.cell
        while True:
            try:
                report = await within(self._actors[role].report.remote(), cell.hang_timeout_s)
            except Exception as error:
                return f"the {role} actor died or hangs: {in_words(error)}"
            self._note(role, report)
            reason = getattr(report, "reason", None)
            if reason is not None:
                return f"{role}: {reason}"
            await asyncio.sleep(cell.check_interval_s)

    async def _is_engine_well(self) -> bool:
        """Whether what is wrong is around the engine; one that a step has paused must go, too."""
        if self._settings.trainer.pause_engine:
            return False
        try:
            asked = self._actors["engine"].report.remote()
            report = await within(asked, self._settings.cell.hang_timeout_s)
        except Exception:
            return False
        return report.reason is None

    async def _weigh(self) -> None:
        """Look at the memory of all roles, now and then."""
        while True:
            self._memory = await asyncio.to_thread(by_role, dict(self._reports))
            await asyncio.sleep(WEIGH_INTERVAL_S)

    def _note(self, role: str, report: Any) -> None:
        """Keep a report, and hold on to its processes: by more than a number that may be reused."""
        known = self._reports.get(role)
        self._reports[role] = report
        pids = pids_of(report)
        if known is None or pids != pids_of(known):
            self._children.setdefault(role, []).extend(alive(pids))

    # Boot, in order.

    async def _boot_around(self) -> None:
        """All but the engine, whose memory gets the weights that are durable, in place."""
        assert self._paths is not None and self._group is not None
        self._stages = []
        await self._stage("model", self._adopt())
        self._actors |= create_actors(AROUND, self._settings, self._paths, self._group)
        await self._attach(has_stale_weights=True)

    async def _boot(self) -> None:
        self._stages = []
        await asyncio.to_thread(evict)
        name = model_name(self._settings.model, self._settings.home)
        state = self._settings.home / "state" / name
        make_directory(state)
        if not self._locks:
            self._locks = [run_dir.lock(state / "lock", name)]
        self._events = Events(state, "cell")
        adopted = await self._stage("model", self._adopt())
        self._paths = CellPaths(
            str(adopted.directory), run_dir.create(), str(state / "ledger.sqlite")
        )
        VersionCounter.create(self._paths.versions)
        Traffic.create(self._paths.traffic)
        self._group = await take_place(self._settings)
        self._actors = create_actors(ROLES, self._settings, self._paths, self._group)
        self._note("engine", await self._start_engine(self._paths))
        await self._attach(has_stale_weights=False)

    async def _attach(self, *, has_stale_weights: bool) -> None:
        limit = self._settings.trainer.attach_timeout_s
        attaching = self._start("trainer", limit, has_stale_weights)
        self._note("trainer", await self._stage("trainer", attaching))
        self._note("checkpoint", await self._start("checkpoint", START_TIMEOUT_S))
        self._note("dream", await self._start("dream", START_TIMEOUT_S))
        self._stages.append(Stage("ready", 0.0, True))

    async def _stage(self, name: str, work: Awaitable[T]) -> T:
        begun = time.monotonic()
        self._stages.append(Stage(name, 0.0, False))
        try:
            return await work
        except Exception as error:
            raise BootFailed(f"{name}: {in_words(error)}") from None
        finally:
            self._stages[-1] = Stage(name, round(time.monotonic() - begun, 1), True)

    async def _adopt(self) -> Any:
        settings = self._settings
        dtype = settings.dtype
        if dtype == "auto":
            dtype = "bfloat16" if has_gpu(settings) else "float32"
        threads = settings.journal.threads
        adopting = adopt_model.remote(settings.model, settings.home, dtype, threads)
        return await within(adopting, ADOPT_TIMEOUT_S)

    async def _start(self, role: str, timeout_s: float, *arguments: Any) -> Any:
        return await within(self._actors[role].start.remote(*arguments), timeout_s)

    async def _start_engine(self, paths: CellPaths) -> Any:
        """Start vLLM; its loader appends a line to the progress file as it enters a stage."""
        timeout_s = self._settings.engine.boot_timeout_s
        starting = asyncio.ensure_future(self._start("engine", timeout_s))
        begun = time.monotonic()
        self._stages.append(Stage("weights", 0.0, False))
        try:
            while not starting.done():
                await asyncio.wait([starting], timeout=0.1)
                begun = self._advance(_newest_stage(paths), begun)
            self._advance(ENGINE_STAGES[-1], begun)
            return starting.result()
        except Exception as error:
            raise BootFailed(f"{self._stages[-1].name}: {in_words(error)}") from None
        finally:
            self._stages[-1] = Stage(
                self._stages[-1].name, round(time.monotonic() - begun, 1), True
            )

    def _advance(self, reached: str, begun: float) -> float:
        """Close the stages before `reached`; returns when the open one began."""
        while self._stages[-1].name != reached:
            now = time.monotonic()
            done = self._stages[-1].name
            self._stages[-1] = Stage(done, round(now - begun, 1), True)
            following = ENGINE_STAGES[ENGINE_STAGES.index(done) + 1]
            self._stages.append(Stage(following, 0.0, False))
            begun = now
        return begun

    # Shutdown, in any state.

    async def _tear_down(self, roles: Sequence[str]) -> None:
        """End these actors and vLLM's processes with its own, by id; with all, free the memory."""
        for role in roles:
            if role in self._actors:
                ray.kill(self._actors[role], no_restart=True)
        children = [each for role in roles for each in self._children.get(role, ())]
        await asyncio.to_thread(wait_or_kill, children)
        for known in (self._actors, self._reports, self._children, self._memory):
            for role in roles:
                known.pop(role, None)
        if "engine" not in roles:
            return
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        if self._paths is not None:
            run_dir.remove(Path(self._paths.run_dir))
            self._paths = None

    async def _ended(self, call: Any, timeout_s: float) -> None:
        try:
            await within(call, timeout_s)
        except Exception:
            return  # It is killed next, whatever it answered.


def _newest_stage(paths: CellPaths) -> str:
    """The stage that vLLM's loader entered last."""
    try:
        return Path(paths.progress).read_text().split()[-1]
    except (FileNotFoundError, IndexError):
        return ENGINE_STAGES[0]
