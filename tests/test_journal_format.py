"""Another reader, written from the README alone: it uses nothing of `apollo`."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backports import zstd
from blake3 import blake3

from apollo.journal.disk import RealDisk
from apollo.journal.recovery import open_journal
from tests.small_model import CHUNK_WORDS, NAME, first_state, learned, put_model


def manifest_of(folder: Path) -> dict[str, Any]:
    envelope = json.loads(max(folder.glob("manifest-*.json")).read_text())
    assert blake3(envelope["body"].encode()).hexdigest() == envelope["hash"]
    body: dict[str, Any] = json.loads(envelope["body"])
    return body


def chunks_of(directory: Path, chunk_words: int) -> list[tuple[str, np.ndarray]]:
    """Every chunk as (tensor, words), in order."""
    found = []
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        for name in sorted(set(header) - {"__metadata__"}):
            begin, end = header[name]["data_offsets"]
            kind = {"F32": "<u4", "BF16": "<u2", "F16": "<u2"}[header[name]["dtype"]]
            words = np.frombuffer(data[8 + length + begin : 8 + length + end], kind)
            for at in range(0, len(words), chunk_words):
                found.append((name, words[at : at + chunk_words]))
    return found


def plane_of(stored: bytes, size: int) -> np.ndarray:
    if not stored:
        return np.zeros(size, np.uint8)
    data = stored[1:] if stored[0] == 0 else zstd.decompress(stored[1:])
    return np.frombuffer(data, np.uint8)


def numbers(planes: list[bytes], size: int) -> np.ndarray:
    total = np.zeros(size, np.int64)
    for at, plane in enumerate(planes):
        total |= plane_of(plane, size).astype(np.int64) << (8 * at)
    return total


def applied(old: np.ndarray, delta: bytes) -> np.ndarray:
    mode, word_bytes, count = struct.unpack_from("<BBI", delta)
    planes, at = [], 6
    while at < len(delta):
        (length,) = struct.unpack_from("<I", delta, at)
        planes.append(delta[at + 4 : at + 4 + length])
        at += 4 + length
    steps = np.zeros(len(old), np.int64)
    if mode == 1:
        zigzag = numbers(planes, len(old))
        steps = np.where(zigzag & 1, -(zigzag >> 1) - 1, zigzag >> 1)
    else:
        where = np.cumsum(numbers(planes[:3], count) + 1) - 1
        bits = plane_of(planes[3], -(-count // 8))
        is_down = np.unpackbits(bits, count=count).astype(bool)
        sizes = numbers(planes[4 : 4 + word_bytes], count) + 1
        steps[where] = np.where(is_down, -sizes, sizes)
    num_bits = 8 * word_bytes
    sign, all_bits = 1 << (num_bits - 1), (1 << num_bits) - 1

    def ordered(words: np.ndarray) -> np.ndarray:
        return np.where(words & sign, words ^ (sign - 1), words)

    moved = (ordered(old.astype(np.int64)) + steps) & all_bits
    return ordered(moved).astype(old.dtype)


@pytest.mark.parametrize("num_commits", [1, 4])
def test_the_newest_generation_is_found_without_our_code(tmp_path: Path, num_commits: int) -> None:
    disk = RealDisk(tmp_path)
    state = first_state()
    put_model(disk, state)
    journal = open_journal(disk, NAME, chunk_words=CHUNK_WORDS).journal
    for number in range(1, num_commits + 1):
        state = learned(state, number)
        journal.commit(state, number, b"moments")

    folder = tmp_path / "state" / NAME / "journal"
    manifest = manifest_of(folder)
    chunks = chunks_of(tmp_path / "models" / NAME, manifest["chunk_words"])
    words = [each for _, each in chunks]
    for generation in manifest["generations"]:
        data = (folder / generation["segment"]["name"]).read_bytes()
        assert data[:8] == b"RVJSEG1\n" and len(data) == generation["segment"]["size"]
        assert blake3(data[:-32]).digest() == data[-32:]
        assert data[-32:].hex() == generation["segment"]["hash"]
        index_at, table_at, facts_at = struct.unpack_from("<QQQ", data, len(data) - 56)
        for chunk, at, length, before in struct.iter_unpack("<IQI32s", data[index_at:table_at]):
            assert blake3(words[chunk].tobytes()).digest() == before
            words[chunk] = applied(words[chunk], data[at : at + length])
        table = b"".join(blake3(each.tobytes()).digest() for each in words)
        assert table == data[table_at:facts_at]
        assert blake3(table).hexdigest() == generation["root"]
    for name, expected in state.items():
        parts = [each for (tensor, _), each in zip(chunks, words, strict=True) if tensor == name]
        assert np.array_equal(np.concatenate(parts), expected)
