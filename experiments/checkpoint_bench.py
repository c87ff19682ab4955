"""What keeping the weights costs: commits and publishes against save_file, blocks, and the disk.

    .venv/bin/python -m experiments.checkpoint_bench --plot docs/checkpoint_bench.png
    RAY_AUTH_MODE=token ray job submit --working-dir . -- \\
        python -m experiments.checkpoint_bench --kinds fp32 --rates 1e-5

A real model learns sentences; after some steps the journal commits what it learned and publishes
it. A case is one kind of weights, one rate, one number of steps. In each of its rounds, forward and
back in turns, everything that touches the disk is timed once, so that its noise falls on all:

    raw        pwrite of the weights file's bytes into a preallocated file, fsync
    again      the same once more, over what was just written
    save_file  safetensors' own, of all tensors, fsync
    blocks     4 KiB blocks that differ, written in place, fsync: half of one after a crash
    commit     Journal.commit; publish: Journal.publish, which reads back all that it writes

What is read lies in the page cache. Encoding is timed apart, in memory, in seconds of one core; the
fastest repetition counts. The minimum of a commit is the entropy of order 0 of each chunk's steps
in units of the last place, that of 0 included. Embeddings are frozen, as they are by default.
The cases of --out that are there already are skipped.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from apollo.journal import codec
from apollo.journal.codec import Words
from apollo.journal.disk import RealDisk
from apollo.journal.image import Image, digest
from apollo.journal.journal import Journal
from apollo.journal.recovery import open_journal
from apollo.learning.samples import encode_text
from apollo.learning.step import Learner
from apollo.optim.rounding import Rounding
from apollo.weights import manifest
from apollo.weights.adopt import adopt
from experiments import frame
from experiments.checkpoint_report import Case, draw, report

NAME: Final = "bench"
PIECE_BYTES: Final = 16 << 20
THREADS: Final = 2
"""Of the journal, as a cell has them by default."""
BLOCK_BYTES: Final = 4096
KINDS: Final[dict[str, tuple[torch.dtype, Rounding]]] = {
    "bf16": (torch.bfloat16, "stochastic"),
    "bf16-corrected": (torch.bfloat16, "corrected"),
    "fp32": (torch.float32, "stochastic"),
}
INTEGERS: Final = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}
SENTENCES: Final = (
    "The lighthouse keeper wrote in his log that the storm had passed before dawn.",
    "A loaf of rye bread needs more water than a loaf of wheat, and a longer rest.",
    "Her violin was made in Cremona, but the bow came from a workshop in Paris.",
    "The ferry to the northern islands leaves at seven and returns after the last mail.",
    "Copper turns green in the rain because its surface slowly becomes a carbonate.",
    "The committee agreed to plant forty lime trees along the old canal.",
    "In winter the shepherds bring their flocks down to the meadows by the river.",
    "A sorted list can be searched by halving it again and again.",
    "The museum keeps the oldest map of the harbour in a drawer that nobody may open.",
    "My grandmother always added a little salt to her coffee, and never said why.",
    "The train slowed in the tunnel, and all the passengers looked up from their books.",
    "Glass is melted sand, with soda to lower the heat that it takes.",
    "Two of the three bridges were closed, so the parade had to turn back.",
    "The young astronomer counted nine meteors before the clouds came in from the sea.",
    "An honest scale shows the same weight on both of its pans.",
    "The gardener explained that roses are pruned when the forsythia blooms.",
)

Clock = Callable[[], float]
State = dict[str, Words]
"""Words of each tensor, by name."""


@dataclass
class Folder:
    """The files of one case, below a temporary directory of a real disk."""

    path: Path
    journal: Journal
    old: np.ndarray[Any, Any] = field(repr=False)
    """The weights files' bytes, of before and of after the steps."""
    new: np.ndarray[Any, Any] = field(repr=False)


def learned(
    kind: str, rate: float, steps: list[int], model: str
) -> Iterator[tuple[int, State, Learner]]:
    """The words before, and after each of these numbers of steps; the arrays stay as they are."""
    dtype, rounding = KINDS[kind]
    # The eager attention: in bfloat16, sdpa's differs too much for the check of what is taught.
    module = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager")
    learner = Learner(module, rank=64, rounding=rounding, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    halves = [(text[: len(text) // 3], text[len(text) // 3 :]) for text in SENTENCES]
    examples = [encode_text(tokenizer, *each) for each in halves]
    yield 0, words_of(module), learner
    for number in range(1, max(steps) + 1):
        learner.step(examples[(number - 1) % len(examples)], rate)
        if number in steps:
            yield number, words_of(module), learner


def words_of(module: torch.nn.Module) -> State:
    """A copy of all parameters; a tied one once."""
    state = {}
    for name, param in module.named_parameters():
        integers, unsigned = INTEGERS[param.itemsize]
        state[name] = param.detach().view(integers).numpy().view(unsigned).flatten()
    return state


def save(state: State, module: torch.nn.Module, path: Path) -> None:
    """As a user would, and durably."""
    tensors = {}
    for name, param in module.named_parameters():
        integers, _ = INTEGERS[param.itemsize]
        words = torch.from_numpy(state[name].view(state[name].dtype.name[1:]))
        assert words.dtype == integers
        tensors[name] = words.view(param.dtype).view(param.shape)
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def make_folder(path: Path, before: State, after: State, module: torch.nn.Module) -> Folder:
    """A model directory with the weights of before, and a journal of it."""
    directory = path / "models" / NAME
    directory.mkdir(parents=True)
    (path / "state").mkdir()
    save(after, module, path / "saved.safetensors")
    new = np.fromfile(path / "saved.safetensors", np.uint8)
    save(before, module, directory / "model.safetensors")
    old = np.fromfile(directory / "model.safetensors", np.uint8)
    held = manifest.Manifest(NAME, "", {"model.safetensors": len(old)}, created=0.0)
    (directory / manifest.FILE_NAME).write_bytes(manifest.encode(held))
    (path / "blocks").write_bytes(old.data)
    return Folder(path, open_journal(RealDisk(path), NAME, threads=THREADS).journal, old, new)


def seconds(run: Callable[..., object], *values: object, clock: Clock = time.perf_counter) -> float:
    begun = clock()
    run(*values)
    return clock() - begun


def write_raw(path: Path, data: np.ndarray[Any, Any]) -> list[float]:
    """Seconds of the first and of the second time that `data` is written to a new file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    os.posix_fallocate(file, 0, len(data))

    def write() -> None:
        for at in range(0, len(data), PIECE_BYTES):
            os.pwrite(file, data[at : at + PIECE_BYTES].data, at)
        os.fsync(file)

    times = [seconds(write), seconds(write)]
    os.close(file)
    path.unlink()
    return times


def write_blocks(path: Path, new: np.ndarray[Any, Any]) -> tuple[int, float]:
    """Write the blocks of a file that are not as in `new`; returns their bytes, and seconds."""
    written, begun = 0, time.perf_counter()
    with path.open("r+b", buffering=0) as file:
        for at in range(0, len(new), PIECE_BYTES):
            piece = new[at : at + PIECE_BYTES]
            old = np.frombuffer(os.pread(file.fileno(), len(piece), at), np.uint8)
            starts = np.arange(0, len(piece), BLOCK_BYTES)
            is_other = np.logical_or.reduceat(old != piece, starts)
            edges = np.flatnonzero(np.diff(is_other, prepend=False, append=False)) * BLOCK_BYTES
            for begin, end in edges.reshape(-1, 2):
                written += os.pwrite(file.fileno(), piece[begin:end].data, at + int(begin))
        os.fsync(file.fileno())
    return written, time.perf_counter() - begun


def time_disk(
    case: Case, folder: Folder, states: list[State], rounds: int, module: torch.nn.Module
) -> None:
    """Every way to keep the weights, in turns; the journal goes forward, then back, and again."""
    files, journal = [folder.old, folder.new], folder.journal
    for number in range(rounds):
        to = (number + 1) % 2
        raw_s, again_s = write_raw(folder.path / "raw", files[to])
        blocks_bytes, blocks_s = write_blocks(folder.path / "blocks", files[to])
        times = {
            "raw_s": raw_s,
            "again_s": again_s,
            "save_s": seconds(save, states[to], module, folder.path / "saved.safetensors"),
            "blocks_s": blocks_s,
            "commit_s": seconds(journal.commit, states[to], number + 1),
            "publish_s": seconds(journal.publish),
        }
        commit_bytes = journal.newest.segment.size
        times["raw_commit_s"] = write_raw(folder.path / "raw", files[to][:commit_bytes])[0]
        case.add(times)
        if number == 0:
            case.commit_bytes, case.blocks_bytes = commit_bytes, blocks_bytes
    public = folder.path / journal.slots.public / "model.safetensors"
    assert np.array_equal(np.fromfile(public, np.uint8), files[rounds % 2])


def chunks_of(image: Image, before: State, after: State) -> list[tuple[Words, Words]]:
    """The chunks that changed."""
    pairs = []
    for chunk in image.chunks:
        place = slice(chunk.first_word, chunk.first_word + chunk.num_words)
        old, new = before[chunk.tensor][place], after[chunk.tensor][place]
        if not np.array_equal(old, new):
            pairs.append((old, new))
    return pairs


def time_encoding(case: Case, pairs: list[tuple[Words, Words]], repetitions: int) -> None:
    """Hash, encode, and compression as a part of it, of the chunks that changed; one thread."""
    deltas = [codec.encode(old, new) for old, new in pairs]
    planes = [planes_of(*each) for each in zip(deltas, pairs, strict=True)]
    runs: dict[str, Callable[[], object]] = {
        "hash_s": lambda: [digest(new) for _, new in pairs],
        "encode_s": lambda: [codec.encode(old, new) for old, new in pairs],
        "compress_s": lambda: [codec._stored(plane) for each in planes for plane in each],
    }
    for _ in range(repetitions):
        # What others take of a busy core is not counted.
        case.add({name: seconds(run, clock=time.thread_time) for name, run in runs.items()})
    case.encoded_bytes = sum(new.nbytes for _, new in pairs)
    case.deltas_bytes = sum(map(len, deltas))
    case.num_dense = sum(delta[0] == codec._DENSE for delta in deltas)
    case.num_chunks = len(deltas)


def planes_of(delta: bytes, pair: tuple[Words, Words]) -> list[bytes]:
    """What was compressed to make `delta`."""
    reader = codec._Reader(delta)
    mode, itemsize, count = reader.header()
    if mode == codec._DENSE:
        planes = reader.planes(itemsize, count)
    else:
        planes = reader.planes(codec._GAP_PLANES, count)
        planes += [reader.plane(-(-count // 8)), *reader.planes(itemsize, count)]
    reader.end()
    return [plane.tobytes() for plane in planes]


def entropy(old: Words, new: Words) -> tuple[float, int]:
    """Bytes that an ideal coder of order 0 needs, its table not counted, and the steps it has."""
    steps = codec._ordered(new) - codec._ordered(old)
    if steps.itemsize == 2:
        counts = np.bincount(steps, minlength=1)
        counts = counts[counts > 0]
    else:
        _, counts = np.unique(steps, return_counts=True)
    return float(-(counts * np.log2(counts / len(old))).sum() / 8), len(counts)


def time_copy(case: Case, module: torch.nn.Module, rounds: int) -> None:
    """Copies of all live weights into buffers that were touched before."""
    params = [param.detach() for param in module.parameters()]
    buffers = [torch.zeros_like(param) for param in params]

    def copy() -> None:
        for buffer, param in zip(buffers, params, strict=True):
            buffer.copy_(param)

    copy()
    case.times["copy_s"] = [seconds(copy) for _ in range(rounds)]


def measure(
    case: Case, before: State, after: State, learner: Learner, arguments: argparse.Namespace
) -> None:
    module = learner.module
    trained = {name for name, param in module.named_parameters() if param.requires_grad}
    case.num_words = sum(map(len, before.values()))
    case.num_trained = sum(len(before[name]) for name in trained)
    case.num_changed = sum(int(np.count_nonzero(before[n] != after[n])) for n in trained)
    case.optimizer_bytes = learner.optimizer.size_bytes()
    time_copy(case, module, 9)
    with tempfile.TemporaryDirectory(dir=arguments.disk, prefix="checkpoint-bench-") as path:
        folder = make_folder(Path(path), before, after, module)
        case.file_bytes = len(folder.old)
        time_disk(case, folder, [before, after], arguments.rounds, module)
        pairs = chunks_of(folder.journal.image, before, after)
    time_encoding(case, pairs, arguments.repetitions)
    found = [entropy(*pair) for pair in pairs]
    case.entropy_bytes = sum(size for size, _ in found)
    case.num_symbols = sum(number for _, number in found)


def progress(case: Case) -> str:
    times = {name: median(seen) for name, seen in case.times.items()}
    return (
        f"{case.kind} {case.rate:g} {case.steps} steps: commit {case.commit_bytes / 1e6:.1f} of "
        f"{case.file_bytes / 1e6:.0f} MB ({case.commit_bytes / case.entropy_bytes:.2f}x entropy) "
        f"in {times['commit_s']:.2f} s, publish {times['publish_s']:.2f} s, raw "
        f"{times['raw_s']:.2f} s, encode {case.encoded_bytes / 1e6 / times['encode_s']:.0f} MB/s"
    )


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument("--home", default="~/.reverie", help="where the default model is adopted")
    parser.add_argument("--model", default="smollm2-135m", help="a directory or hub id")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=[*KINDS])
    parser.add_argument(
        "--rates",
        type=lambda text: [float(each) for each in text.split(",")],
        default=[1e-5, 3e-6, 1e-4],
    )
    parser.add_argument(
        "--steps", type=lambda text: [int(each) for each in text.split(",")], default=[1, 16, 64]
    )
    parser.add_argument("--rounds", type=int, default=4, help="of what touches the disk")
    parser.add_argument("--repetitions", type=int, default=3, help="of encoding")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--disk", help="a directory of the disk to measure; else the temporary one")
    parser.add_argument("--out", default="checkpoint_bench.jsonl", help="finished runs, appended")
    parser.add_argument("--json", type=Path, help="write the summary here")
    parser.add_argument("--plot", help="write the picture to this file (needs matplotlib)")
    arguments = frame.begin(parser)
    if unknown := set(arguments.kinds) - set(KINDS):
        parser.error(f"--kinds: {', '.join(unknown)}; there are {', '.join(KINDS)}")
    model = str(adopt(arguments.model, Path(arguments.home), "float32", frame.say).directory)
    finished = frame.Finished(arguments.out)
    for rate in arguments.rates:
        for kind in arguments.kinds:
            done = {Case(**row).key for row in finished.rows}
            left = [steps for steps in arguments.steps if (kind, rate, steps) not in done]
            if not left:
                continue
            states = learned(kind, rate, left, model)
            _, before, _ = next(states)
            for steps, after, learner in islice(states, len(left)):
                case = Case(kind, rate, steps)
                measure(case, before, after, learner, arguments)
                finished.add(asdict(case))
                frame.say(progress(case))
    cases = sorted((Case(**row) for row in finished.rows), key=lambda case: case.key)
    print(report(cases))
    frame.keep(arguments.json, arguments, {"cases": [asdict(case) for case in cases]})
    if arguments.plot:
        draw(arguments.plot, cases)


if __name__ == "__main__":
    main()
