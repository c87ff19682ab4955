"""A copy of one model's state elsewhere, by rsync, and the way back from it.

    home, read only:  public directory (leased) | journal's files | ledger, dream (SQLite's backup)
                            \\ what is missing there, whole, under names that never change meaning
    mirror:           anchor-N/  journal/  databases/  ... then mirror.json, which names them all

Needs no cell and no lock: files of the journal are written once, the public directory is leased,
and databases are copied by SQLite. `mirror.json` comes last and in one step: until then the mirror
is what it was before, and what a broken run left is used by the next. The ledger is copied after
the manifest was read, so it may know of more than the weights: as after a crash, that is queued
again. What the new mirror.json does not name is removed only afterwards.
"""

import json
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from actors.errors import Conflict, SettingsError, Unavailable
from actors.rsync import Vanished, checked, hashed, require_rsync, rsync

if TYPE_CHECKING:
    from apollo.journal.chain import Chain

FORMAT: Final = 1
INDEX: Final = "mirror.json"
DATABASES: Final = ("ledger.sqlite", "dream.sqlite")
TRIES: Final = 5
"""A file may go while it is shipped (old generations are added up): then all is looked at anew."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Index:
    """What a mirror holds; its file is the mirror's only one that ever changes."""

    model: str
    created: float
    generation: int
    """The newest."""
    weights_version: int
    anchor: str
    """Directory of a complete model, of a generation that the manifest has."""
    anchor_generation: int
    files: dict[str, tuple[int, str]]
    """Size and BLAKE3 of every other file, by its path in the mirror."""
    format: int = FORMAT

    @classmethod
    def decode(cls, text: str) -> "Index":
        """Raises SettingsError for what is none."""
        try:
            row = json.loads(text)
            files = {
                name: (int(size), str(digest)) for name, (size, digest) in row["files"].items()
            }
            index = cls(**{**row, "files": files})
        except (ValueError, TypeError, KeyError, AttributeError):
            raise SettingsError(f"{INDEX} is damaged; mirror to another place") from None
        if index.format != FORMAT:
            raise SettingsError(
                f"{INDEX} has format {index.format}, and this Reverie knows {FORMAT}"
            )
        return index


def mirror(home: Path, model: str, destination: str, say: Say) -> Index:
    """Bring the mirror at `destination` (a directory, or `host:path`) up to date; verified.

    Blocks on the disk and the network. Raises SettingsError, Conflict or Unavailable; the mirror is
    then what it was before.
    """
    require_rsync()
    destination = checked(home, destination)
    if not (home / "models" / model).is_dir():
        raise SettingsError(f"--model {model!r}: REVERIE_HOME/models has no such model")
    with tempfile.TemporaryDirectory(prefix="reverie-mirror-") as folder:
        before = _index_of(destination, Path(folder))
        if before is not None and before.model != model:
            raise Conflict(
                f"{destination} is the mirror of {before.model!r}; give {model!r} its own place"
            )
        for _ in range(TRIES):
            try:
                return _ship(home, model, destination, before, Path(folder), say)
            except Vanished:
                say("a file went while it was shipped; looking at the journal anew")
        raise Unavailable("the journal changes too quickly; try again later")


def _ship(
    home: Path, model: str, destination: str, before: Index | None, folder: Path, say: Say
) -> Index:
    from apollo.journal import chain as chains
    from apollo.journal.disk import RealDisk

    journal = f"state/{model}/journal"
    newest, _ = chains.read_newest(RealDisk(home), journal)
    if newest is None:
        raise SettingsError(f"{model!r} has no journal yet; start it once")
    staged = folder / "staged"
    shutil.rmtree(staged, ignore_errors=True)
    files = _stage(home, journal, newest, staged)
    anchor, number = _anchor(home, model, destination, newest, before, files, say)
    made = Index(
        model,
        time.time(),
        newest.newest.generation,
        newest.newest.weights_version,
        anchor,
        number,
        files,
    )
    say(f"journal and databases: {len(files)} files")
    for options in ([], ["--checksum"]):  # What is damaged there is sent again.
        _send(home, made, destination, staged, folder, options)
        say("comparing checksums")
        wrong = _differing(home, made, destination, staged, folder)
        if not wrong:
            break
    else:
        raise Unavailable(
            f"{wrong[0]} is not there as it was sent; the mirror is what it was before: look at "
            "the disk there, and run it again"
        )
    _check_anchor(destination, made)
    (folder / INDEX).write_text(json.dumps(asdict(made), indent=1, sort_keys=True))
    rsync(["--checksum"], f"{folder / INDEX}", destination)
    _prune(destination, made, folder)
    return made


def _stage(
    home: Path,
    journal: str,
    newest: "Chain",
    staged: Path,
) -> dict[str, tuple[int, str]]:
    """Copies of the databases, under names of their content; what the mirror will hold."""
    from apollo.journal.chain import manifest_name

    files: dict[str, tuple[int, str]] = {}
    for name in sorted({*newest.files(), manifest_name(newest.sequence)}):
        path = home / journal / name
        # A name comes again with other bytes where a damaged end of the journal was set aside.
        files[f"journal/{name}"] = hashed(path)
    (staged / "databases").mkdir(parents=True)
    for name in DATABASES:
        source = home / Path(journal).parent / name
        if source.exists():
            copy = staged / name
            _back_up(source, copy)
            size, digest = hashed(copy)
            shipped = f"databases/{digest[:16]}-{name}"
            copy.rename(staged / shipped)
            files[shipped] = (size, digest)
    return files


def _anchor(
    home: Path,
    model: str,
    destination: str,
    newest: "Chain",
    before: Index | None,
    files: dict[str, tuple[int, str]],
    say: Say,
) -> tuple[str, int]:
    """The complete model that the deltas begin from; shipped only if the one there is of no use."""
    from apollo.journal.disk import lease
    from apollo.weights import manifest

    if before is not None and newest.find(before.anchor_generation) is not None:
        inside = {n: f for n, f in before.files.items() if n.startswith(f"{before.anchor}/")}
        is_remote = ":" in destination
        if is_remote or all(_size(Path(destination) / n) == inside[n][0] for n in inside):
            files.update(inside)
            return before.anchor, before.anchor_generation
    with lease(home / "models" / model) as directory:
        number = manifest.require(directory).generation
        name = f"anchor-{number:08d}"
        say(f"anchor: the complete model of generation {number}")
        for entry in sorted(directory.iterdir()):
            if entry.is_file():
                files[f"{name}/{entry.name}"] = hashed(entry)
        rsync(["-rL"], f"{directory}/", f"{destination}/{name}", True)
    if newest.find(number) is None:
        raise Vanished
    return name, number


def _send(
    home: Path, made: Index, destination: str, staged: Path, folder: Path, options: list[str]
) -> str:
    """Journal and databases, as far as they are not there; returns what rsync said."""
    journal = _list(folder, (name for name in made.files if name.startswith("journal/")))
    state = f"{home}/state/{made.model}/"
    said = rsync(
        [f"--files-from={journal}", *options], state, destination, "--dry-run" not in options
    )
    return said + rsync(["-r", *options], f"{staged}/", destination)


def _differing(home: Path, made: Index, destination: str, staged: Path, folder: Path) -> list[str]:
    """What of it is there otherwise than here, by checksum."""
    options = ["--checksum", "--dry-run", "--out-format=%i %n"]
    lines = _send(home, made, destination, staged, folder, options).splitlines()
    # Those of files whose content would be sent begin so; the rest are times and directories.
    return [line.split(" ", 1)[1] for line in lines if line.startswith(("<f", ">f"))]


def _check_anchor(destination: str, made: Index) -> None:
    """Compare a local anchor with its hashes; a remote one was compared when it was sent."""
    for name in made.files if ":" not in destination else ():
        path = Path(destination) / name
        is_anchor = name.startswith(f"{made.anchor}/")
        if is_anchor and not _is_as_sent(path, made.files[name]):
            path.unlink(missing_ok=True)  # So that the next run sends an anchor anew.
            raise Unavailable(f"{name} is damaged there; run it again, which sends it anew")


def _prune(destination: str, made: Index, folder: Path) -> None:
    """Remove what the index does not name: nothing is transferred, the rest is deleted."""
    kept = folder / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    for name in (*made.files, INDEX):
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        (kept / name).touch()
    rsync(["-r", "--delete", "--existing", "--ignore-existing"], f"{kept}/", destination)


# The way back.


def restore(home: Path, source: str, say: Say) -> Index:
    """Put a mirror's state into `home`, where the model must not be; the next boot recovers it.

    Raises Conflict if it is there, Unavailable if something of the mirror is damaged or missing;
    `home` is then as before, but for what a second try goes on with.
    """
    require_rsync()
    source = checked(home, source)
    with tempfile.TemporaryDirectory(prefix="reverie-mirror-") as folder:
        index = _index_of(source, Path(folder))
    if index is None:
        raise SettingsError(f"{source} has no {INDEX}: it is not a whole mirror")
    models, state = home / "models" / index.model, home / "state" / index.model
    coming = home / "state" / f".{index.model}.restoring"
    if models.exists() or (state.exists() and not (coming / "anchor").is_dir()):
        raise Conflict(
            f"REVERIE_HOME has the model {index.model!r} already; move models/{index.model} and "
            f"state/{index.model} away, or set another REVERIE_HOME"
        )
    coming.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not state.exists():
        say(f"fetching generation {index.generation} of {index.model}")
        listed = _list(coming, index.files)
        rsync([f"--files-from={listed}"], f"{source}/", str(coming), progress=True)
        say("comparing hashes")
        for name, expected in index.files.items():
            if not _is_as_sent(coming / name, expected):
                (coming / name).unlink(missing_ok=True)
                raise Unavailable(f"{name} is damaged or missing there; nothing was restored")
        _arrange(coming, index)
        (coming / "state").rename(state)
    models.parent.mkdir(parents=True, exist_ok=True)
    (coming / "anchor").rename(models)  # Last: without it there is no model to boot.
    shutil.rmtree(coming)
    _sync(models.parent)
    _sync(state.parent)
    return index


def _arrange(coming: Path, index: Index) -> None:
    """Give everything the place that it has in a home, durably, under its temporary name."""
    (coming / "state").mkdir(mode=0o700)
    (coming / "journal").rename(coming / "state" / "journal")
    for name in index.files:
        if name.startswith("databases/"):
            (coming / name).rename(coming / "state" / name.split("-", 1)[1])
    (coming / index.anchor).rename(coming / "anchor")
    for folder, _, names in os.walk(coming):
        for name in names:
            _sync(Path(folder) / name)
        _sync(Path(folder))


# Databases, the index, and small things.


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path)) as database:
        yield database


def _back_up(source: Path, copy: Path) -> None:
    """A consistent copy of a database that may be in use, as one file."""
    with _opened(source) as there, _opened(copy) as here:
        there.backup(here)
        here.execute("PRAGMA journal_mode = DELETE")


def _index_of(destination: str, folder: Path) -> Index | None:
    """The mirror's index; None where there is nothing; SettingsError for something else."""
    try:
        rsync([], f"{destination}/{INDEX}", str(folder / "before.json"), may_lack=True)
    except FileNotFoundError:
        local = Path(destination)
        if ":" not in destination and local.is_dir() and any(local.iterdir()):
            known = {"journal", "databases"}
            strange = [p.name for p in local.iterdir() if not p.name.startswith(("anchor-", "."))]
            if set(strange) - known:
                raise SettingsError(
                    f"{destination} has {strange[0]!r} and no {INDEX}: it is no mirror; choose an "
                    "empty or a new directory"
                ) from None
        return None
    return Index.decode((folder / "before.json").read_text())


def _is_as_sent(path: Path, expected: tuple[int, str]) -> bool:
    """Whether it is there with that size and hash."""
    return path.is_file() and hashed(path) == expected


def _list(folder: Path, names: Iterable[str]) -> str:
    path = folder / "files"
    path.write_text("".join(f"{name}\n" for name in names))
    return str(path)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
