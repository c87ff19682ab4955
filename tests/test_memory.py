"""The one copy: what one process writes into the shared file, every other sees at once."""

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from apollo.weights.layout import LayoutError, TensorView, WeightLayout
from apollo.weights.memory import ALIGNMENT, Mapping, place

ROOT = Path(__file__).parents[1]


class TinyModel(nn.Module):
    """Two layers and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.first = nn.Linear(6, 7)
        self.second = nn.Linear(7, 6, bias=False)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(self.embed(ids)))
        out: torch.Tensor = self.head(self.second(hidden))
        return out


def placed(directory: Path, model: nn.Module) -> WeightLayout:
    """Place a model and describe each parameter as one view; its values are kept."""
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    blocks, spans = place(model, directory / "weights")
    views = []
    for span in spans:
        tensor = model.get_parameter(span.name)
        tensor.data.copy_(before[span.name])
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        views.append(
            TensorView(span.name, span.block, span.block_offset_bytes, shape, stride, "float32")
        )
    return WeightLayout.checked("cpu", blocks, tuple(views))


def run_python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_parameters_move_into_one_private_file(tmp_path: Path) -> None:
    model = TinyModel()
    scale = model.get_buffer("scale").data_ptr()
    blocks, spans = place(model, tmp_path / "weights")
    file = tmp_path / "weights"
    assert [block.handle for block in blocks] == [str(file)]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.stat().st_size == blocks[0].size_bytes
    assert file.stat().st_blocks * 512 >= blocks[0].size_bytes, "reserved, not sparse"
    assert [span.name for span in spans] == [name for name, _ in model.named_parameters()]
    base = spans[0].address
    for span in spans:
        assert model.get_parameter(span.name).data_ptr() == span.address
        assert span.address == base + span.block_offset_bytes
        assert span.block_offset_bytes % ALIGNMENT == 0
    assert model.get_buffer("scale").data_ptr() == scale


def test_tied_parameter_stays_one(tmp_path: Path) -> None:
    model = TinyModel()
    _, spans = place(model, tmp_path / "weights")
    assert model.get_parameter("head.weight") is model.get_parameter("embed.weight")
    names = [span.name for span in spans]
    assert "embed.weight" in names and "head.weight" not in names


def test_placed_model_computes_what_it_did(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = TinyModel(), torch.arange(5)
    before = model(ids)
    placed(tmp_path, model)
    assert torch.equal(model(ids), before)


def test_another_process_sees_writes_and_its_writes_are_seen(tmp_path: Path) -> None:
    model = TinyModel()
    layout = placed(tmp_path, model)
    layout.save(tmp_path / "layout.json")
    script = """
import sys
from pathlib import Path
from apollo.weights.layout import WeightLayout
from apollo.weights.memory import Mapping
tensors = Mapping(WeightLayout.load(Path(sys.argv[1])), is_writable=True).tensors()
for line in sys.stdin:
    print(float(tensors["first.weight"][3, 4]), flush=True)
    tensors["second.weight"][1, 2] = float(line)
    print("written", flush=True)
"""
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "layout.json")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdin is not None and other.stdout is not None
        for value in (1.5, -2.25):
            with torch.no_grad():
                model.get_parameter("first.weight")[3, 4] = value
            other.stdin.write(f"{value * 2}\n")
            other.stdin.flush()
            assert float(other.stdout.readline()) == value
            assert other.stdout.readline() == "written\n"
            assert model.get_parameter("second.weight")[1, 2] == value * 2, "seen at once"
        other.stdin.close()
        assert other.wait(30) == 0
    finally:
        if other.poll() is None:
            other.kill()
            other.wait()


def test_read_only_mapping_cannot_be_written(tmp_path: Path) -> None:
    model = TinyModel()
    layout = placed(tmp_path, model)
    layout.save(tmp_path / "layout.json")
    before = (tmp_path / "weights").read_bytes()
    script = """
import sys
from pathlib import Path
from apollo.weights.layout import WeightLayout
from apollo.weights.memory import Mapping
layout = WeightLayout.load(Path(sys.argv[1]))
tensors = Mapping(layout, is_writable=False).tensors()
print(float(tensors["first.weight"].sum()), flush=True)
tensors["first.weight"][0, 0] = 7.0
print("written", flush=True)
"""
    ended = run_python(script, str(tmp_path / "layout.json"))
    assert ended.returncode == -signal.SIGSEGV, ended.stderr
    total = float(model.get_parameter("first.weight").detach().sum())
    assert float(ended.stdout) == pytest.approx(total)
    assert (tmp_path / "weights").read_bytes() == before


def test_full_shared_memory_is_an_error_with_sizes_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    model = nn.Linear(1024, 1024, bias=False)
    with pytest.raises(LayoutError, match=r"4 MiB of shared memory are needed .* MiB are free"):
        place(model, tmp_path / "weights")
    assert list(tmp_path.iterdir()) == []


def test_existing_file_is_never_taken_over(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"somebody's")
    with pytest.raises(FileExistsError):
        place(TinyModel(), tmp_path / "weights")
    assert (tmp_path / "weights").read_bytes() == b"somebody's"


def test_parameter_that_is_not_contiguous_is_refused_by_name(tmp_path: Path) -> None:
    model = TinyModel()
    model.first.weight = nn.Parameter(torch.empty(6, 7).t())
    with pytest.raises(LayoutError, match=r"^first\.weight: is not contiguous"):
        place(model, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_memory_shared_by_two_parameters_is_refused_by_name(tmp_path: Path) -> None:
    model = TinyModel()
    model.head.weight = nn.Parameter(model.embed.weight.data)  # the same memory, not the same tie
    with pytest.raises(LayoutError, match=r"^head\.weight: "):
        place(model, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_parameter_without_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"^weight: weights on \['meta'\]"):
        place(nn.Linear(3, 3, device="meta"), tmp_path / "weights")


def test_views_stay_mapped_after_the_mapping_is_gone(tmp_path: Path) -> None:
    model = TinyModel()
    layout = placed(tmp_path, model)
    view = Mapping(layout, is_writable=False).tensors()["first.weight"]
    (tmp_path / "weights").unlink()
    assert torch.equal(view, model.get_parameter("first.weight"))


def test_update_in_backward_does_not_disturb_the_other_views(tmp_path: Path) -> None:
    """Each view has its own autograd version: a step in one layer's hook is invisible to others."""
    torch.manual_seed(0)
    layout = placed(tmp_path, TinyModel())
    views = Mapping(layout, is_writable=True).tensors()
    first = nn.Parameter(views["first.weight"])
    second = nn.Parameter(views["second.weight"])
    # The input wants a gradient, so the first layer's weight is read after the second's update.
    x, learning_rate = torch.randn(3, 6, requires_grad=True), 0.1

    expected = [p.detach().clone().requires_grad_() for p in (first, second)]
    torch.relu(x @ expected[0].t()).matmul(expected[1].t()).square().sum().backward()

    updated: list[torch.Tensor] = []

    def step(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        with torch.no_grad():
            parameter.add_(parameter.grad, alpha=-learning_rate)
        parameter.grad = None
        updated.append(parameter)

    for parameter in (first, second):
        parameter.register_post_accumulate_grad_hook(step)
    torch.relu(x @ first.t()).matmul(second.t()).square().sum().backward()

    assert updated[0] is second and updated[1] is first, "the last layer is updated first"
    for plain, name in zip(expected, ("first.weight", "second.weight"), strict=True):
        assert plain.grad is not None
        live = Mapping(layout, is_writable=False).tensors()[name]
        torch.testing.assert_close(live, plain.detach() - learning_rate * plain.grad)
