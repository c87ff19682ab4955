"""A full check names each kind of damage, says what is lost by it, and changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest

from apollo.journal import chain, segment
from apollo.journal import scrub as scrubbing
from apollo.journal.chain import StoredFile
from apollo.journal.disk import DiskFailed
from apollo.journal.recovery import open_journal
from apollo.journal.retention import thin
from apollo.journal.scrub import DamagedCopy, Scrub, scrub
from apollo.journal.segment import Segment, SegmentWriter
from tests.crashes import FAR_S, FOLDER, Story, Teller, first_disk
from tests.model_disk import Image, ModelDisk, whole_image
from tests.small_model import CHUNK_WORDS, NAME, PUBLIC

HIDDEN = f"models/.{NAME}.next"
OLD = f"{FOLDER}/00000001-00000002.rvj"
B = "b.safetensors"
LAST = ("layer.b", 8, 1)
"""The last chunk of the last file: its last two bytes."""


def life() -> Image:
    """Generations 0 to 5: 4 is public, 3 hidden."""
    disk = first_disk()
    teller = Teller(disk, Story())
    for number in range(1, 6):
        teller.commit()
        if number < 5:
            teller.publish()
    return whole_image(disk)


IMAGE = life()
MANIFEST = max(path for path in IMAGE.files if "/manifest-" in path)


class NoWrites(ModelDisk):
    """Refuses to change anything, and fails to read some files, once it is told to."""

    is_closed = False
    unreadable = ""

    def _change(self, *changes: Any, is_exchange: bool = False) -> None:
        assert not self.is_closed
        super()._change(*changes, is_exchange=is_exchange)

    def write(self, path: str, offset: int, data: bytes | memoryview) -> None:
        assert not self.is_closed
        super().write(path, offset, data)

    def sync(self, path: str) -> None:
        assert not self.is_closed
        super().sync(path)

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        if self.is_closed and path == self.unreadable:
            raise DiskFailed(f"cannot read {path}: Input/output error")
        return super().read(path, offset, size)


def scrubbed(
    *flips: tuple[str, int], removed: str = "", cut: str = "", unreadable: str = ""
) -> Scrub:
    """What is found after damage to an open journal: bits of (path, byte), or whole files."""
    disk = NoWrites(IMAGE)
    # Opened before it was damaged, and without a publication of the newest.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apollo.journal.journal.Journal.publish", lambda journal, **_: journal.newest)
        journal = open_journal(disk, NAME, chunk_words=CHUNK_WORDS).journal
    for path, at in flips:
        disk._file(path)[at] ^= 1
    if removed:
        disk.remove(removed)
    if cut:
        del disk._file(cut)[-5:]
    disk.unreadable, disk.is_closed = unreadable, True
    return scrub(journal)


@pytest.mark.parametrize(
    ("owner", "check", "flips"),
    [
        (chain, "_has_hash", [(MANIFEST, 12)]),  # Within the hash, so that the rest is as it was.
        (segment, "_is_sealed", [(OLD, -1)]),
        (StoredFile, "holds", [(f"{FOLDER}/optimizer-00000005.safetensors", 3)]),
        (scrubbing, "_has_hash", [(f"{PUBLIC}/{B}", -1), (f"{HIDDEN}/{B}", -1)]),
    ],
)
def test_without_any_one_check_damage_is_not_named(
    owner: Any, check: str, flips: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not scrubbed(*flips).is_clean
    monkeypatch.setattr(owner, check, lambda *arguments: True)
    assert scrubbed(*flips).is_clean


def test_a_segment_that_does_not_lead_from_its_parent_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole as it was written, and written wrongly: neither its hash nor its deltas tell."""
    add = SegmentWriter.add
    teller = Teller(first_disk(), Story())
    teller.commit()
    with monkeypatch.context() as patch:
        patch.setattr(
            SegmentWriter, "add", lambda writer, at, _, delta: add(writer, at, bytes(32), delta)
        )
        teller.commit()
    teller.commit()
    teller.publish()
    assert scrub(teller.journal).files == (OLD,)
    found = thin(teller.journal, teller.journal.newest.created + FAR_S)
    assert found.dropped == () and OLD in found.damaged[0]
    monkeypatch.setattr(Segment, "follows", lambda *segments: True)
    assert scrub(teller.journal).is_clean
    assert thin(teller.journal, teller.journal.newest.created + FAR_S).dropped


def test_a_manifest_that_has_lost_its_twin_is_named() -> None:
    *_, twin, newest = sorted(path for path in IMAGE.files if "/manifest-" in path)
    assert newest == MANIFEST and scrubbed(removed=twin).files == (twin,)


def test_of_an_undamaged_journal_there_is_nothing_to_say() -> None:
    found = scrubbed()
    assert found.is_clean and (found.files, found.copies, found.lost) == ((), (), ())
    stored = sum(len(data) for path, data in IMAGE.files.items() if path.startswith(FOLDER))
    assert stored <= found.bytes_read <= 3 * stored


def test_after_thinning_there_is_nothing_to_say_and_progress_names_each_segment() -> None:
    journal = open_journal(ModelDisk(IMAGE), NAME, chunk_words=CHUNK_WORDS).journal
    thin(journal, journal.newest.created + FAR_S)
    notes: list[str] = []
    assert scrub(journal, notes.append).is_clean
    assert notes[:3] == [
        "base-00000000.rvj, 1 of 3",
        "00000000-00000004.rvj, 2 of 3",
        "00000004-00000005.rvj, 3 of 3",
    ]
    assert "layer.b, words 8 to 8" in notes


@pytest.mark.parametrize(
    ("found", "files", "copies", "lost"),
    [
        pytest.param(
            lambda: scrubbed((OLD, 20)), [OLD], [], [0, 1], id="a delta, and the way back over it"
        ),
        pytest.param(
            lambda: scrubbed((f"{FOLDER}/00000003-00000004.rvj", 20)),
            [f"{FOLDER}/00000003-00000004.rvj"],
            [],
            [],
            id="a delta with a directory on either side",
        ),
        pytest.param(
            lambda: scrubbed(removed=OLD), [OLD], [], [0, 1, 2], id="a segment that is missing"
        ),
        pytest.param(lambda: scrubbed(cut=OLD), [OLD], [], [0, 1, 2], id="a segment that is cut"),
        pytest.param(
            lambda: scrubbed(unreadable=OLD),
            [OLD],
            [],
            [0, 1, 2],
            id="a segment under a bad sector",
        ),
        pytest.param(
            lambda: scrubbed(unreadable=f"{FOLDER}/base-00000000.rvj"),
            [f"{FOLDER}/base-00000000.rvj"],
            [],
            [0],
            id="the base",
        ),
        pytest.param(
            lambda: scrubbed((f"{FOLDER}/optimizer-00000005.safetensors", 3)),
            [f"{FOLDER}/optimizer-00000005.safetensors"],
            [],
            [],
            id="an optimizer",
        ),
        pytest.param(
            lambda: scrubbed(removed=f"{FOLDER}/optimizer-00000004.safetensors"),
            [f"{FOLDER}/optimizer-00000004.safetensors"],
            [],
            [],
            id="an optimizer that is missing",
        ),
        pytest.param(
            lambda: scrubbed((MANIFEST, 100)),
            [MANIFEST],
            [],
            [],
            id="a manifest",
        ),
        pytest.param(
            lambda: scrubbed((f"{PUBLIC}/{B}", -1)), [], [(PUBLIC, *LAST)], [], id="a public chunk"
        ),
        pytest.param(
            lambda: scrubbed((f"{HIDDEN}/{B}", -1)), [], [(HIDDEN, *LAST)], [], id="a hidden chunk"
        ),
        pytest.param(
            lambda: scrubbed((f"{PUBLIC}/{B}", -1), (f"{HIDDEN}/{B}", -1)),
            [],
            [(PUBLIC, *LAST), (HIDDEN, *LAST)],
            [0, 1, 2, 3, 4, 5],
            id="both copies of a chunk",
        ),
        pytest.param(
            lambda: scrubbed((f"{PUBLIC}/{B}", 20)), [f"{PUBLIC}/{B}"], [], [], id="a header"
        ),
        pytest.param(
            lambda: scrubbed(removed=f"{PUBLIC}/config.json"),
            [f"{PUBLIC}/config.json"],
            [],
            [],
            id="another file of a directory",
        ),
        pytest.param(
            lambda: scrubbed(cut=f"{HIDDEN}/{B}"),
            [f"{HIDDEN}/{B}"],
            [(HIDDEN, "layer.b", 0, 8), (HIDDEN, *LAST)],
            [],
            id="a weights file that is cut",
        ),
    ],
)
def test_each_kind_of_damage_is_named(
    found: Callable[[], Scrub],
    files: list[str],
    copies: list[tuple[str, str, int, int]],
    lost: list[int],
) -> None:
    result = found()
    assert list(result.files) == files
    assert list(result.copies) == [DamagedCopy(*copy) for copy in copies]
    assert list(result.lost) == lost
    assert not result.is_clean
