"""Where the actors of a cell are placed: fractions of one bundle, so that they share one GPU."""

from collections.abc import Sequence
from typing import Any, Final

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.calls import within
from actors.checkpoint import Checkpointer
from actors.dream.actor import Dreamer
from actors.ending import CELL, NAMESPACE
from actors.engine import Engine
from actors.errors import BootFailed
from actors.messages import CellPaths
from actors.settings import Settings
from actors.trainer import Trainer

PLACEMENT_TIMEOUT_S: Final = 60
CONTROL_THREADS: Final = 4
"""Control calls that an actor answers at once, beside its work."""


def has_gpu(settings: Settings) -> bool:
    """Whether the weights live on one."""
    device = settings.device
    return device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)


async def take_place(settings: Settings) -> PlacementGroup:
    """The bundle of a cell; raises BootFailed if the cluster has none that is free."""
    bundle = {"CPU": 1.0, **({"GPU": 1.0} if has_gpu(settings) else {})}
    group: PlacementGroup = placement_group([bundle], strategy="STRICT_PACK", name=CELL)
    try:
        await within(group.ready(), PLACEMENT_TIMEOUT_S)
    except TimeoutError:
        remove_placement_group(group)
        raise BootFailed(
            f"Ray has no free {bundle} for the cell; stop what else runs on this cluster"
        ) from None
    return group


def create_actors(
    roles: Sequence[str], settings: Settings, paths: CellPaths, group: PlacementGroup
) -> dict[str, Any]:
    """Handles of new actors, which have not started; the engine only if it is asked for."""
    shared: dict[str, Any] = {
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_cpus": 0.25,
        "num_gpus": 0.25 if has_gpu(settings) else 0,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, 0),
    }
    remote: Any = ray.remote  # Its stubs do not know this argument.
    with_control = remote(concurrency_groups={"control": CONTROL_THREADS, "report": 1})
    both, made = (settings, paths), {}
    if "engine" in roles:
        made["engine"] = ray.remote(Engine).options(name="engine", **shared).remote(*both)
    trainer = with_control(Trainer).options(name="trainer", **shared).remote(*both)
    keeper = with_control(Checkpointer).options(name="checkpoint", **shared)
    checkpoint = keeper.remote(*both, trainer)
    dreamer = ray.remote(Dreamer).options(name="dream", **shared)
    dream = dreamer.remote(*both, trainer, checkpoint)
    return made | {"trainer": trainer, "checkpoint": checkpoint, "dream": dream}
