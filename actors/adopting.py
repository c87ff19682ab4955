"""Taking a model in, before a boot: a Ray task, so that the cell itself loads no tensors."""

from pathlib import Path
from typing import Any

import ray


@ray.remote(num_cpus=0, max_retries=0)
def adopt_model(model: str, home: Path, dtype: str | None, threads: int) -> Any:
    """Its directory and journal, mended where a crash has left them; slow the first time."""
    from apollo.journal.disk import RealDisk
    from apollo.journal.recovery import open_journal
    from apollo.weights.adopt import adopt, model_name

    disk, name = RealDisk(home), model_name(model, home)
    if disk.is_directory(f"state/{name}/journal"):
        # First: it may have to mend what adoption would refuse.
        open_journal(disk, name, threads=threads)
    adopted = adopt(model, home, dtype, lambda note: None)
    disk.refuse_mount_point(f"models/{adopted.name}")
    open_journal(disk, adopted.name, threads=threads)
    return adopted
