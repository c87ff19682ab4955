"""Whatever is damaged on disk is found out, and what can be mended from elsewhere is.

Every check of a hash is removed in turn, and then something here must go wrong.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from actors import mirror
from apollo.journal import chain, recovery, segment, slots, values
from apollo.journal.chain import StoredFile
from apollo.journal.disk import Disk, DiskFailed
from apollo.journal.journal import Journal
from apollo.journal.recovery import open_journal
from apollo.journal.segment import SegmentDamaged
from apollo.journal.slots import SlotDamaged
from apollo.journal.values import Values, WeightsDamaged
from tests.crashes import FOLDER, Story, Teller, Violation, first_disk
from tests.model_disk import Image, ModelDisk, crashes, whole_image
from tests.small_model import CHUNK_WORDS, NAME, PUBLIC, first_state, is_same, learned, load_public

HIDDEN = f"models/.{NAME}.next"
FLIPS_PER_FILE = 160


def life() -> tuple[Image, Story]:
    """Generation 2 public, 1 hidden, 3 and 4 only in the journal."""
    disk, story = first_disk(), Story()
    teller = Teller(disk, story)
    for is_published in (True, True, False, False):
        teller.commit()
        if is_published:
            teller.publish()
    return whole_image(disk), story


IMAGE, STORY = life()


def flipped(image: Image, path: str, at: int, bit: int) -> Image:
    data = bytearray(image.files[path])
    data[at] ^= 1 << bit
    return Image(image.files | {path: bytes(data)}, image.directories)


def damages() -> Iterator[tuple[str, Image]]:
    """One bit of one file, in many places; files of the journal also cut short."""
    random = Random(0)
    for path, data in IMAGE.files.items():
        if path.startswith(FOLDER) or path.endswith(".safetensors"):
            for _ in range(min(len(data), FLIPS_PER_FILE)):
                at = random.randrange(len(data))
                yield f"{path} byte {at}", flipped(IMAGE, path, at, random.randrange(8))
            cut = data[: random.randrange(len(data))]
            yield f"{path} cut", Image(IMAGE.files | {path: cut}, IMAGE.directories)


def opened(disk: Disk) -> Journal:
    return open_journal(disk, NAME, chunk_words=CHUNK_WORDS).journal


def look(image: Image, what: str) -> None:
    """Open, read all generations, learn on, publish: nothing wrong may be given out as right."""
    disk = ModelDisk(image)
    try:
        found = opened(disk)
    except WeightsDamaged:
        if path_of(what).startswith(PUBLIC):  # Only a damaged header leaves no way at all.
            raise Violation(f"{what}: not rebuilt from the other slot") from None
        raise
    newest = found.newest.generation
    is_of_tail = any(f"-{n:08d}.rvj" in what for n in (3, 4))
    if newest < 4 and not is_of_tail and "optimizer" not in what:
        raise Violation(f"{what}: generation 4 was whole, and {newest} came back")
    if newest < 2:
        raise Violation(f"{what}: fell behind what was public")
    if not is_same(load_public(disk), STORY.states[newest]):
        raise Violation(f"{what}: {newest} is public, and is not what was committed")
    if found.optimizer(found.newest) not in (STORY.optimizers[newest], None):
        raise Violation(f"{what}: a damaged optimizer was given out")
    for each in found.chain.generations:
        state = STORY.states[each.generation]
        for at, chunk_ in enumerate(found.image.chunks):
            try:
                words = found.words(at, each.generation)
            except (WeightsDamaged, SegmentDamaged):
                continue
            first = chunk_.first_word
            if not (words == state[chunk_.tensor][first : first + chunk_.num_words]).all():
                raise Violation(f"{what}: generation {each.generation} is read wrongly")


def path_of(what: str) -> str:
    return what.rsplit(" byte ", 1)[0]


def flip_everything() -> None:
    """One damaged bit at a time, everywhere."""
    for what, image in damages():
        look_unless_refused(image, what)


def look_unless_refused(image: Image, what: str) -> None:
    try:
        look(image, what)
    except Violation:
        raise
    except Exception as error:
        # A header of a public weights file is in no journal: it is named, and nothing is given out.
        if not path_of(what).startswith(PUBLIC):
            raise Violation(f"{what}: {type(error).__name__}: {error}") from error


def lose_the_chain_and_a_bit() -> None:
    """No manifest is whole, and the public weights are damaged: they must not be believed."""
    files = {p: data[:-9] if "manifest-" in p else data for p, data in IMAGE.files.items()}
    image = flipped(Image(files, IMAGE.directories), f"{PUBLIC}/b.safetensors", -1, 0)
    try:
        opened(ModelDisk(image))
    except WeightsDamaged:
        return
    raise Violation("damaged weights became the base of a new journal")


def lose_a_public_chunk() -> None:
    """What the public directory has lost must be had from the hidden one, which is then spared."""
    disk = ModelDisk(flipped(IMAGE, f"{PUBLIC}/b.safetensors", -1, 0))
    try:
        opened(disk)
    except WeightsDamaged:
        raise Violation("not rebuilt from the other slot") from None
    if not is_same(load_public(disk), STORY.states[4]):
        raise Violation("rebuilt wrongly")


class LyingDisk(ModelDisk):
    """Writes another bit than it was told, once, into the hidden directory."""

    has_lied = False

    def write(self, path: str, offset: int, data: bytes | memoryview) -> None:
        if path == f"{HIDDEN}/b.safetensors" and offset and not self.has_lied:
            self.has_lied, data = True, bytes([data[0] ^ 1]) + bytes(data[1:])
        super().write(path, offset, data)


def write_wrongly() -> None:
    """A publication is read back before it is swapped in."""
    disk = LyingDisk(IMAGE)
    try:
        opened(disk)
    except SlotDamaged:
        if not is_same(load_public(disk), STORY.states[2]):
            raise Violation("it was published all the same") from None
        return
    raise Violation("nobody read it back")


def damage_a_commit() -> None:
    """A delta that nobody has read since it was written must not lose the ones before it."""
    name = f"{FOLDER}/00000003-00000004.rvj"
    disk = ModelDisk(flipped(IMAGE, name, 12, 0))
    found = opened(disk)
    if found.newest.generation != 3 or not is_same(load_public(disk), STORY.states[3]):
        raise Violation("the newest whole generation did not come back")


SCENES = [
    flip_everything,
    lose_the_chain_and_a_bit,
    lose_a_public_chunk,
    write_wrongly,
    damage_a_commit,
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_damage_is_found_out_and_mended(scene: Callable[[], None]) -> None:
    scene()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("owner", "check"),
    [
        (chain, "_has_hash"),
        (segment, "_is_sealed"),
        (values, "_has_hash"),
        (Values, "can_read"),
        (slots, "_has_hash"),
        (StoredFile, "holds"),
        (recovery, "_has_root"),
        (recovery, "_has_headers"),
    ],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_without_any_one_check_damage_does_harm(
    owner: Any, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, check, lambda *arguments: True)
    is_found = False
    for scene in SCENES[1:] + SCENES[:1]:
        try:
            scene()
        except Exception:
            is_found = True
            break
    assert is_found


COMPARED = {"digest", "hexdigest", "hash", "headers_hash", "hash_after", "hashed", "table"}
COMPARED_BY = {
    *("chain._has_hash", "chain.holds", "segment._is_sealed", "segment.follows"),
    *("values._has_hash", "values.can_read", "slots._has_hash", "scrub._has_hash"),
    *("recovery._has_root", "recovery._has_headers", "retention._has_root", "mirror._is_as_sent"),
}
"""Each is removed in turn, here or in the tests of scrub, retention, mirror and training."""


def test_no_other_function_compares_a_hash() -> None:
    found = set()
    journal = Path(chain.__file__).parent.glob("*.py")
    for path in [*journal, *Path(mirror.__file__).parent.glob("*.py")]:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                for each in ast.walk(function):
                    if isinstance(each, ast.Compare) and _is_of_hashes(each):
                        found.add(f"{path.stem}.{function.name}")
    assert found == COMPARED_BY


def _is_of_hashes(compared: ast.Compare) -> bool:
    parts = list(ast.walk(compared))
    called = {
        ast.unparse(each.func).rpartition(".")[2] for each in parts if isinstance(each, ast.Call)
    }
    attributes = {each.attr for each in parts if isinstance(each, ast.Attribute)}
    names = {each.id for each in parts if isinstance(each, ast.Name)}
    return bool((called | attributes) & COMPARED or "root" in called or "expected" in names)


class BadSector(ModelDisk):
    """Cannot read one file."""

    unreadable = ""

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        if path == self.unreadable:
            raise DiskFailed(f"cannot read {path}: Input/output error")
        return super().read(path, offset, size)


@pytest.mark.parametrize(
    "path",
    [*(path for path in IMAGE.files if path.startswith(FOLDER)), f"{HIDDEN}/reverie.json"],
)
def test_a_file_that_cannot_be_read_is_damage_and_no_more(path: str) -> None:
    """What else there is comes back, and can be learned on from."""
    disk = BadSector(IMAGE)
    disk.unreadable = path
    found = opened(disk)
    newest = found.newest.generation
    expected = {"00000002-00000003.rvj": 2, "00000003-00000004.rvj": 3}
    assert newest == expected.get(path.rpartition("/")[2], 4)
    disk.unreadable = ""
    assert is_same(load_public(disk), STORY.states[newest])
    state = learned(STORY.states[newest], 9)
    assert found.commit(state, 50, b"moments", 5).generation == newest + 1


class LeavingDisk(ModelDisk):
    """Can do so many things, and then nothing any more."""

    left = 10**9

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in ("read", "write", "sync", "names", "size", "create", "rename", "exchange"):
            return found

        def act(*arguments: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise DiskFailed(f"cannot {name}: Input/output error")
            return found(*arguments)

        return act


def test_a_disk_that_goes_away_in_the_middle_is_said_to_have_failed() -> None:
    """Never that something is missing or damaged, which somebody might act on."""
    num_acts = 0
    while True:
        disk = LeavingDisk(IMAGE)
        disk.left = num_acts
        try:
            opened(disk)
            break
        except DiskFailed:
            num_acts += 1
    assert num_acts > 100


@pytest.mark.parametrize("name", ["reverie.json", "a.safetensors"])
def test_a_public_file_that_cannot_be_read_is_rebuilt_from_the_other_directory(name: str) -> None:
    disk = BadSector(IMAGE)
    disk.unreadable = f"{PUBLIC}/{name}"
    journal = open_journal(disk, NAME, chunk_words=CHUNK_WORDS).journal
    disk.unreadable = ""
    assert journal.newest.generation == 4 and is_same(load_public(disk), STORY.states[4])


def test_of_what_the_way_back_is_lost_all_else_is_kept() -> None:
    disk = ModelDisk(IMAGE)
    before = opened(disk)
    newest, moments = before.newest, before.optimizer(before.newest)
    disk.remove(f"{FOLDER}/00000000-00000001.rvj")
    after = opened(disk)
    assert [each.kind for each in after.chain.generations] == ["base"]
    assert (after.newest.step, after.newest.created) == (newest.step, newest.created)
    assert moments is not None and after.optimizer(after.newest) == moments


def test_what_is_set_aside_is_not_lost_with_the_power() -> None:
    name = "00000003-00000004.rvj"
    disk = ModelDisk(flipped(IMAGE, f"{FOLDER}/{name}", 12, 0))
    assert name in open_journal(disk, NAME, chunk_words=CHUNK_WORDS).set_aside
    for crash in crashes(disk, 150, 0):
        assert any(path.endswith(name) for path in crash.image.files)


def test_a_disk_that_is_full_changes_nothing_and_learning_goes_on() -> None:
    """Wherever it is full, the generation before is whole, and the next commit works."""
    from apollo.journal.disk import DiskFull

    class FullDisk(ModelDisk):
        left = 10**9

        def write(self, path: str, offset: int, data: bytes | memoryview) -> None:
            self.left -= 1
            if self.left < 0:
                raise DiskFull("cannot write")
            super().write(path, offset, data)

    for room in range(60):
        disk = FullDisk(first_disk().image)
        teller = Teller(disk, Story())
        teller.commit()
        state = learned(teller.story.states[1], 5)
        disk.left = room
        try:
            teller.journal.commit(state, 50, b"moments", 5)
            # There was no room for the manifest's twin; it comes with the next one.
            assert disk.left < 0
            disk.left = 10**9
            teller.publish()
            again = opened(disk)
            assert is_same(load_public(disk), state)
            assert again.optimizer(again.newest) == b"moments"
            break
        except DiskFull:
            disk.left = 10**9
            assert teller.journal.newest.generation == 1
            assert not [
                name
                for name in disk.names(FOLDER)
                if "00000002.rvj" in name or "optimizer-00000002" in name
            ], room
            assert teller.journal.commit(state, 50, b"moments", 5).generation == 2
            assert is_same(load_public(disk), first_state())
            teller.publish()
            assert is_same(load_public(disk), state)
    else:
        raise AssertionError("it never fitted")
    assert room > 5
