"""What the trainer takes back from the journal: at boot, and when the weights return.

optimizer of the newest generation --> the trainer's optimizer
steps that a return has undone     --> the ledger, and what is forgotten with it goes
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from actors.ledger import Ledger
from actors.messages import CellPaths
from actors.versions import VersionCounter

if TYPE_CHECKING:
    from apollo.journal.chain import Generation
    from apollo.journal.disk import RealDisk
    from apollo.optim.optimizer import Apollo

log = logging.getLogger(__name__)


def begin_from_public(
    home: Path,
    paths: CellPaths,
    optimizer: "Apollo",
    ledger: Ledger,
    versions: VersionCounter,
    *,
    has_stale_weights: bool,
) -> int:
    """Have ledger, optimizer, versions and live weights all be of the public directory.

    Weights that were just loaded from it are; stale ones are overwritten, while the engine reads.
    Returns its generation.
    """
    from apollo.journal.live import restore
    from apollo.weights import manifest

    directory = Path(paths.model_dir)
    public = manifest.require(directory)
    if public.generation == 0:
        ledger.claim(public.created)
    recall(home, directory.name, optimizer, ledger)
    version = ledger.recover(public.weights_version)
    if has_stale_weights:
        versions.end_broken_step()
        versions.begin_writing(version)
        restore(Path(paths.layout), directory)
    versions.weights_version = version
    if has_stale_weights:
        versions.next_epoch()
    return public.generation


def recall(home: Path, model: str, optimizer: "Apollo", ledger: Ledger) -> None:
    """Optimizer and ledger as they belong to the newest generation of the model's journal.

    What was learned after it is the ledger's business: see `recover`.
    """
    from apollo.journal.chain import read_newest
    from apollo.journal.disk import RealDisk

    disk, folder = RealDisk(home), f"state/{model}/journal"
    chain, _ = read_newest(disk, folder)
    assert chain is not None, "a boot opens the journal before the trainer starts"
    why = _load_optimizer(disk, folder, chain.newest, optimizer)
    if why is not None and chain.newest.step:
        log.warning("the optimizer's moments begin anew: %s", why)
    for each in chain.generations:
        if each.undone_after is not None and each.returns_to is not None:
            ledger.undo(
                each.undone_after,
                each.weights_version,
                each.returns_to,
                is_again=each.is_learned_again,
                besides=each.forgotten,
            )
    ledger.wipe()


def _load_optimizer(
    disk: "RealDisk", folder: str, generation: "Generation", optimizer: "Apollo"
) -> str | None:
    """Load what was kept with a generation, or begin anew; returns in words why."""
    from apollo.journal.disk import DiskFailed
    from apollo.optim import state_file

    state_file.forget(optimizer, generation.step)
    stored = generation.optimizer
    if stored is None:
        return "none was kept"
    path = f"{folder}/{stored.name}"
    try:
        if not stored.holds(disk.read(path)):
            return "it is damaged"
        state_file.load(optimizer, disk.path(path))
    except (FileNotFoundError, DiskFailed, state_file.OtherOptimizer) as error:
        return str(error)
    return None


def write_optimizer(optimizer: "Apollo", path: Path) -> None:
    """Write the optimizer's state for the checkpoint actor to take."""
    from apollo.optim import state_file

    path.unlink(missing_ok=True)
    state_file.save(optimizer, path)
