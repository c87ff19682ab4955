"""What the trainer takes back from the journal: at boot, and when the weights return.

optimizer of the newest generation --> the trainer's optimizer
steps that a return has undone     --> the ledger, and what is forgotten with it goes
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from actors.ledger import Ledger

if TYPE_CHECKING:
    from apollo.journal.chain import Generation
    from apollo.journal.disk import RealDisk
    from apollo.optim.optimizer import Apollo

log = logging.getLogger(__name__)


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
