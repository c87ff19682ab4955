"""Publishing: stock loaders read what was live, whole; or the directory stays what it was."""

import errno
import os
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from apollo.weights import snapshot
from apollo.weights.snapshot import (
    SnapshotError,
    copy_rest,
    empty_directory,
    exchange,
    verify_weights,
    write_weights,
)

NUM_SWAPS = 200
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """A random Llama of several shards, and a file that is not weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        dtype="float32",
    )
    directory = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(directory, max_shard_size="50KB")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "reverie.json").write_text("{}")
    assert len(shards(directory)) > 1
    return directory


@pytest.fixture
def hidden(tmp_path: Path) -> Path:
    empty_directory(tmp_path / ".model.next")
    return tmp_path / ".model.next"


@pytest.fixture
def live(public: Path) -> Tensors:
    """The published weights after some learning; one is a strided view, as engines keep them."""
    tensors = {name: tensor + 0.125 for name, tensor in read(public).items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    wide = torch.zeros(32, 48)
    wide[:, 8:40] = tensors[name]
    tensors[name] = wide[:, 8:40]
    assert not tensors[name].is_contiguous()
    tensors["model.norm.weight"][:3] = torch.tensor([float("nan"), -0.0, float("inf")])
    return tensors


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def read(directory: Path) -> Tensors:
    """As a stock reader does."""
    return {name: tensor for path in shards(directory) for name, tensor in load_file(path).items()}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def assert_same(tensors: Tensors, expected: Tensors) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        ours, theirs = tensor.contiguous(), expected[name].contiguous()
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32)), name


def publish(live: Tensors, public: Path, hidden: Path) -> None:
    write_weights(live, public, hidden)
    verify_weights(live, hidden)
    copy_rest(public, hidden, excluded=("reverie.json",))
    exchange(hidden, public)


def test_stock_safetensors_reads_the_live_values(live: Tensors, public: Path, hidden: Path) -> None:
    names = {path.name: set(load_file(path)) for path in shards(public)}
    publish(live, public, hidden)
    assert_same(read(public), live)
    assert {path.name: set(load_file(path)) for path in shards(public)} == names


def test_stock_transformers_loads_the_live_values(
    live: Tensors, public: Path, hidden: Path
) -> None:
    publish(live, public, hidden)
    assert_same(AutoModelForCausalLM.from_pretrained(public).state_dict(), live)


def test_the_other_files_come_along_but_for_the_excluded(
    live: Tensors, public: Path, hidden: Path
) -> None:
    before = contents(public)
    publish(live, public, hidden)
    after = contents(public)
    assert set(before) - set(after) == {"reverie.json"}
    others = [name for name in after if not name.endswith(".safetensors")]
    assert {"config.json", "chat_template.jinja", "model.safetensors.index.json"} <= set(others)
    assert all(after[name] == before[name] for name in others)
    assert contents(hidden) == before, "the generation before is kept whole"


def test_written_bytes_are_counted_and_metadata_is_kept(
    live: Tensors, public: Path, hidden: Path
) -> None:
    written = write_weights(live, public, hidden)
    assert written == sum(path.stat().st_size for path in shards(hidden))
    for ours, theirs in zip(shards(hidden), shards(public), strict=True):
        assert header_of(ours) == header_of(theirs)


def header_of(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


# What must not be published.


def test_published_tensor_that_is_not_live_is_refused_by_name(
    live: Tensors, public: Path, hidden: Path
) -> None:
    del live["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(SnapshotError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: "):
        write_weights(live, public, hidden)


def test_live_tensor_that_is_in_no_file_is_refused_by_name(
    live: Tensors, public: Path, hidden: Path
) -> None:
    write_weights(live, public, hidden)
    with pytest.raises(SnapshotError, match=r"^extra: is live but in no file"):
        verify_weights(live | {"extra": torch.ones(1)}, hidden)


def test_file_with_a_tensor_that_is_not_live_is_refused_by_name(
    live: Tensors, public: Path, hidden: Path
) -> None:
    write_weights(live, public, hidden)
    del live["model.norm.weight"]
    with pytest.raises(SnapshotError, match=r"^model\.norm\.weight: is not live"):
        verify_weights(live, hidden)


def test_one_flipped_bit_is_found_and_named(live: Tensors, public: Path, hidden: Path) -> None:
    write_weights(live, public, hidden)
    shard = shards(hidden)[-1]
    data = bytearray(shard.read_bytes())
    last = min(load(bytes(data)), key=lambda name: -offset_of(bytes(data), name))
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(SnapshotError, match=rf"^{last}: reads back differently"):
        verify_weights(live, hidden)


def offset_of(data: bytes, name: str) -> int:
    """Where a tensor's header entry says it begins."""
    entry = data.partition(f'"{name}":'.encode())[2].partition(b'"data_offsets":[')[2]
    return int(entry.partition(b",")[0])


def test_truncated_file_is_refused(live: Tensors, public: Path, hidden: Path) -> None:
    write_weights(live, public, hidden)
    shard = shards(hidden)[0]
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(SnapshotError, match=rf"^{shard.name} cannot be read back: "):
        verify_weights(live, hidden)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["as Python says it", "as safetensors says it"],
)
def test_full_disk_leaves_the_public_directory_as_it_was(
    live: Tensors, public: Path, hidden: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    before, real, calls = contents(public), safetensors.torch.save_file, []

    def fails_at_the_second_file(*arguments: object, **named: object) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        real(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(snapshot, "save_file", fails_at_the_second_file)
    with pytest.raises((OSError, SnapshotError), match="No space left on device"):
        publish(live, public, hidden)
    assert len(calls) == 2
    assert contents(public) == before


def test_safetensors_reports_a_failed_write_as_we_expect(
    live: Tensors, public: Path, hidden: Path
) -> None:
    for path in shards(public):
        (hidden / path.name).mkdir()  # nothing can be written there
    with pytest.raises((OSError, SnapshotError)):
        write_weights(live, public, hidden)


# The swap.


def test_reader_sees_one_complete_generation_at_every_instant(
    live: Tensors, public: Path, hidden: Path
) -> None:
    a = contents(public)
    write_weights(live, public, hidden)
    copy_rest(public, hidden, excluded=())
    b = contents(hidden)
    assert a.keys() == b.keys() and a != b
    seen, wrong, is_over = [0, 0], [], threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            directory = os.open(public, os.O_RDONLY | os.O_DIRECTORY)
            try:
                found = {name: read_at(directory, name) for name in os.listdir(directory)}
            finally:
                os.close(directory)
            if found not in (a, b):
                wrong.append(sorted(found))
                return
            seen[found == b] += 1

    reader = threading.Thread(target=watch)
    reader.start()
    for _ in range(NUM_SWAPS):
        exchange(hidden, public)
        have = sum(seen)
        while sum(seen) == have and reader.is_alive():  # the reader looks at least once per swap
            threading.Event().wait(0.0005)
    is_over.set()
    reader.join(30)
    assert not wrong
    assert min(seen) > 0 and contents(public) == a


def read_at(directory: int, name: str) -> bytes:
    with open(os.open(name, os.O_RDONLY, dir_fd=directory), "rb") as file:
        return file.read()


def test_file_that_is_open_during_the_swap_stays_what_it_was(
    live: Tensors, public: Path, hidden: Path
) -> None:
    path = shards(public)[0]
    before = path.read_bytes()
    with path.open("rb") as opened:
        publish(live, public, hidden)
        assert opened.read() == before
    assert path.read_bytes() != before


def test_swap_with_a_missing_directory_changes_nothing(public: Path, tmp_path: Path) -> None:
    before = contents(public)
    with pytest.raises(OSError, match="No such file"):
        exchange(tmp_path / "absent", public)
    assert contents(public) == before


def test_what_a_crash_left_is_emptied(tmp_path: Path) -> None:
    left = tmp_path / "left"
    (left / "deep").mkdir(parents=True)
    (left / "deep" / "half").write_bytes(b"x")
    empty_directory(left)
    assert list(left.iterdir()) == []
