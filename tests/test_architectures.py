"""Every architecture, with vLLM's own classes: mapped whole, taught in place, or refused by name.

A host process loads small random checkpoints with vLLM's model classes and our loader; this process
plays the trainer. The oracle is transformers: a stock model of the same checkpoint, taught the same
step and saved by transformers under the checkpoint's names.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from apollo.learning.samples import Example
from apollo.learning.step import Learner
from apollo.weights.attach import attach, empty_module
from apollo.weights.layout import DTYPES, LayoutError, TensorView, WeightLayout
from apollo.weights.memory import Mapping
from apollo.weights.names import parameter_views
from tests.architectures import (
    ARCHITECTURES,
    VOCAB,
    copy_of,
    edit_config,
    edit_weights,
    make_model,
    qwen3_5_27b,
    save,
    with_dtype,
)

ROOT = Path(__file__).parents[1]
IDS = torch.randint(VOCAB, (32,), generator=torch.Generator().manual_seed(1)).tolist()
EXAMPLE = Example(tuple(IDS[:12]), tuple(IDS[12:]))
LEARNING_RATE = 1e-2
FROZEN = {"model.embed_tokens.weight", "lm_head.weight"}
"""Not trained by default; in vLLM's words and in the checkpoint's."""
EXIT_TIMEOUT_S = 30
PADDED_VOCAB = 128
MAX_PLAN_GROWTH_BYTES = 300 * 2**20
"""Of a process that records 54 GB of weights: Python's objects for 64 layers, and no weights."""

MIXED = "qwen3.5-mixed"
"""bfloat16 with A_log in float32, which is how vLLM keeps a Qwen3.5 on a GPU."""
PREFIXED = "qwen3.5-prefixed"
"""Named as in a checkpoint with a vision tower."""
NUM_TENSORS = {
    "llama": 39,
    "llama-tied": 38,
    "qwen2-biases": 51,
    "qwen3": 47,
    "mistral-window": 39,
    "gemma3-windows": 54,
    "gemma2-softcap": 46,
    "mixtral-experts": 79,
    "qwen3-experts": 87,
    "qwen3.5-hybrid": 56,
    MIXED: 56,
    PREFIXED: 56,
}
SHARDED = ["qwen3", "qwen2-biases", "mixtral-experts", "qwen3.5-hybrid"]


@dataclass
class Host:
    """`layout_host.py` at work on a directory of checkpoints."""

    work: Path
    process: subprocess.Popen[str]
    log: Path

    def ask(self, what: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([what, arguments]) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise AssertionError(f"the host ended:\n{self.log.read_text()}")

    def load(self, name: str, kernels: str = "kept") -> str | None:
        """Load in the checkpoint's own type; the refusal, if any."""
        dtype = json.loads((self.work / name / "config.json").read_text())["dtype"]
        answer: str | None = self.ask("load", name=name, dtype=dtype, kernels=kernels)
        return answer

    def stored(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.work / name / "model.safetensors")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take longer than these small matrices."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    work = tmp_path_factory.mktemp("checkpoints")
    for name in ARCHITECTURES:
        save(work / name, make_model(name))
    save(work / MIXED, make_model("qwen3.5-hybrid").to(torch.bfloat16))
    edit_weights(work / MIXED, lambda weights: with_dtype(weights, "A_log", torch.float32))
    edit_weights(
        copy_of(work, "qwen3.5-hybrid", PREFIXED),
        lambda weights: {
            name.replace("model.", "model.language_model."): tensor
            for name, tensor in weights.items()
        },
    )
    log = work / "log"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.layout_host", str(work)],
        cwd=ROOT,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "WARNING", "GLOO_SOCKET_IFNAME": "lo"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log.open("w"),
        text=True,
    )
    try:
        host = Host(work, process, log)
        host.ask("ranks", names=SHARDED)
        yield host
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(EXIT_TIMEOUT_S) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@dataclass
class Served:
    """One architecture in the host's memory."""

    name: str
    host: Host
    layout: WeightLayout
    stored: dict[str, torch.Tensor]

    @property
    def directory(self) -> Path:
        return self.host.work / self.name

    def live(self) -> dict[str, torch.Tensor]:
        return Mapping(self.layout, is_writable=False).tensors()

    def engine(self) -> dict[str, str]:
        """Digests of the engine's parameters, as it sees them now."""
        answer: dict[str, str] = self.host.ask("digests", name=self.name)
        return answer

    def stock(self) -> Any:
        """As anybody loads it; A_log as it is stored, which `from_pretrained` would round."""
        module = AutoModelForCausalLM.from_pretrained(self.directory, attn_implementation="sdpa")
        for name, parameter in list(module.named_parameters()):
            if name.endswith("A_log") and name in self.stored:
                owner, _, leaf = name.rpartition(".")
                exact = nn.Parameter(self.stored[name].clone())
                assert torch.equal(exact.to(parameter.dtype), parameter)
                module.get_submodule(owner)._parameters[leaf] = exact
        return module

    @contextmanager
    def restored(self) -> Iterator[bytes]:
        """The bytes of the weights, which are put back at the end."""
        path = Path(self.layout.blocks[0].handle)
        before = path.read_bytes()
        try:
            yield before
        finally:
            with path.open("r+b") as file:
                file.write(before)


@pytest.fixture(scope="module", params=NUM_TENSORS)
def served(request: pytest.FixtureRequest, host: Host) -> Served:
    name = request.param
    assert host.load(name) is None
    layout = WeightLayout.load(host.work / f"{name}.layout")
    return Served(name, host, layout, host.stored(name))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = module.eval()(torch.tensor([IDS])).logits
        return found


# Mapped, and taught.


def test_every_tensor_is_mapped_and_equals_the_checkpoint(served: Served) -> None:
    assert len(served.layout) == len(served.stored) == NUM_TENSORS[served.name]
    live = served.live()
    assert live.keys() == served.stored.keys()
    for name, tensor in served.stored.items():
        assert live[name].dtype == tensor.dtype and live[name].shape == tensor.shape, name
        assert torch.equal(bits(live[name]), bits(tensor)), name
    tables = [view for view in served.layout if view.shape[0] == VOCAB]
    assert served.layout.padding_bytes == sum(
        (PADDED_VOCAB - VOCAB) * view.size_bytes // VOCAB for view in tables
    )


def test_engine_computes_with_the_mapped_weights_and_no_packed_copy(served: Served) -> None:
    assert served.host.ask("packed", name=served.name) == []


def test_trainers_module_answers_as_the_stock_model_does(served: Served) -> None:
    module: Any = attach(served.layout, served.directory)
    expected = logits(served.stock())
    # Near zero even for bfloat16: the same numbers go through the same code.
    torch.testing.assert_close(logits(module), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1


def test_one_step_changes_what_a_stock_step_changes_and_nothing_else(
    served: Served, tmp_path: Path
) -> None:
    with served.restored() as before:
        engine_before = served.engine()
        teach_one_step(attach(served.layout, served.directory))
        stock = served.stock()
        teach_one_step(stock)
        stock.save_pretrained(tmp_path)
        expected, live = load_file(tmp_path / "model.safetensors"), served.live()
        assert live.keys() == expected.keys()
        frozen = set()
        for name, tensor in expected.items():
            if torch.equal(bits(tensor), bits(served.stored[name])):
                frozen.add(name)
                assert torch.equal(bits(live[name]), bits(tensor)), name
            else:
                # Bit for bit where this was written; another machine may sum in another order.
                torch.testing.assert_close(live[name], tensor, rtol=1e-2, atol=1e-4)
        assert {name.replace("language_model.", "") for name in frozen} <= FROZEN
        engine_after = served.engine()
        unchanged = {name for name in engine_after if engine_after[name] == engine_before[name]}
        assert unchanged == FROZEN & engine_after.keys()
        trained = [view for view in served.layout if view.name not in frozen]
        assert_only_these_changed(served.layout, trained, before)


def teach_one_step(module: Any) -> None:
    learner = Learner(module, rank=4, seed=7, kernels="eager")
    report = learner.step(EXAMPLE, LEARNING_RATE)
    learner.close()
    assert report.applied and report.skipped == () and len(report.tensors) >= 20


def assert_only_these_changed(layout: WeightLayout, views: list[TensorView], before: bytes) -> None:
    """Every byte of the shared memory outside `views` is what it was, padding included."""
    after = Path(layout.blocks[0].handle).read_bytes()
    memory = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in (before, after)]
    changed = memory[0] != memory[1]
    for view in views:
        itemsize = DTYPES[view.dtype].itemsize
        strides = (*(step * itemsize for step in view.stride), 1)
        changed.as_strided((*view.shape, itemsize), strides, view.offset_bytes).fill_(False)
    assert not changed.any()


# Qwen3.5-27B, without memory.


def test_qwen3_5_27b_is_mapped_whole_on_the_meta_device(host: Host) -> None:
    directory = host.work / "qwen3.5-27b"
    qwen3_5_27b().save_pretrained(directory)
    process = psutil.Process()
    before = process.memory_info().rss
    assert host.ask("plan", name=directory.name) < MAX_PLAN_GROWTH_BYTES
    layout = WeightLayout.load(host.work / f"{directory.name}.layout")
    assert len(layout) == 851
    assert sum(view.num_elements for view in layout) == 26_895_998_464
    assert (layout.size_bytes, layout.padding_bytes) == (53_792_001_536, 0)
    module: Any = empty_module(directory, torch.bfloat16)
    views = parameter_views(module, layout)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert {name: view.shape for name, view in views.items()} == shapes
    assert process.memory_info().rss - before < MAX_PLAN_GROWTH_BYTES


# Ranks of a tensor-parallel engine.


@pytest.mark.parametrize("name", SHARDED)
def test_ranks_record_which_box_of_each_tensor_they_hold(host: Host, name: str) -> None:
    stored = host.stored(name)
    left = {key: torch.ones(tensor.shape, dtype=torch.bool) for key, tensor in stored.items()}
    for rank in (0, 1):
        layout = WeightLayout.load(host.work / f"{name}.rank{rank}.layout")
        assert {view.name for view in layout} == stored.keys()
        live = Mapping(layout, is_writable=False)
        for view in layout:
            start = view.part.start if view.part else (0,) * len(view.shape)
            box = tuple(slice(at, at + n) for at, n in zip(start, view.shape, strict=True))
            assert torch.equal(bits(live.tensor(view)), bits(stored[view.name][box])), view.name
            left[view.name][box] = False
        with pytest.raises(LayoutError, match=r"^\S+: only a part .*; one cell is one device"):
            attach(layout, host.work / name)
    assert not any(mask.any() for mask in left.values())


def test_rank_holds_several_boxes_of_a_tensor_that_the_engine_splits(host: Host) -> None:
    layout = WeightLayout.load(host.work / "qwen3.5-hybrid.rank1.layout")
    name = "model.layers.0.linear_attn.in_proj_qkv.weight"
    starts = [view.part.start for view in layout if view.name == name and view.part]
    assert starts == [(8, 0), (24, 0), (48, 0)]  # its half of 16 q, 16 k and 32 v rows


def test_loader_refuses_more_than_one_rank(host: Host) -> None:
    refusal = host.ask("load", name="qwen3", dtype="float32", kernels="kept", num_ranks=2)
    assert refusal == "parallel size 2: one cell is one device"


# Refused, by name.


@pytest.mark.parametrize("name", ["mixtral-experts", "qwen3-experts"])
def test_experts_that_vllm_repacks_for_this_cpu_are_refused_by_name(host: Host, name: str) -> None:
    copy_of(host.work, name, f"{name}-repacked")
    refusal = host.load(f"{name}-repacked", kernels="own")
    assert refusal is not None
    assert refusal.endswith("kernels: a GPU, and --moe-backend triton")
    assert "routed_experts.w13_weight: vLLM repacked it after loading" in refusal


def test_experts_that_a_kernel_shuffles_in_place_are_refused_by_name(host: Host) -> None:
    copy_of(host.work, "qwen3-experts", "shuffled")
    refusal = host.load("shuffled", kernels="shuffled")
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    assert refusal is not None and refusal.startswith(f"{name}: differs from the checkpoint")


def test_transposed_tensor_is_refused_by_name(host: Host) -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=VOCAB)
    save(host.work / "gpt2", transformers.GPT2LMHeadModel(config))
    refusal = host.load("gpt2")
    assert refusal is not None and refusal.startswith("transformer.h.0.attn.c_attn.weight: ")


def test_tensor_that_vllm_skips_is_refused_by_name(host: Host) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    directory = copy_of(host.work, "llama", "with-tables")
    edit_weights(directory, lambda weights: weights | {name: torch.ones(4)})
    refusal = host.load("with-tables")
    assert refusal is not None and refusal.startswith(f"{name}: is in the checkpoint but")


def test_type_that_the_engine_would_round_is_refused_by_name(host: Host) -> None:
    name = "model.layers.0.linear_attn.norm.weight"  # float32 in Qwen3.5 as it is published
    directory = copy_of(host.work, MIXED, "as-published")
    edit_weights(directory, lambda weights: with_dtype(weights, ".norm.", torch.float32))
    refusal = host.load("as-published")
    assert refusal is not None
    assert refusal.startswith(f"{name}: torch.float32 in the checkpoint but torch.bfloat16 in the")


def test_second_copy_of_a_tied_embedding_is_refused_by_name(host: Host) -> None:
    directory = copy_of(host.work, "llama-tied", "tied-twice")
    table = "model.embed_tokens.weight"
    edit_weights(directory, lambda weights: weights | {"lm_head.weight": weights[table].clone()})
    refusal = host.load("tied-twice")
    assert refusal is not None and refusal.startswith("lm_head.weight: vLLM repacked it")


def test_head_that_is_served_untied_but_would_be_taught_tied_is_refused(host: Host) -> None:
    directory = copy_of(host.work, "llama-tied", "half-tied")
    table = "model.embed_tokens.weight"
    edit_weights(directory, lambda weights: weights | {"lm_head.weight": weights[table] + 1})
    assert host.load("half-tied") is None
    layout = WeightLayout.load(host.work / "half-tied.layout")
    with pytest.raises(LayoutError, match=r"^lm_head\.weight: .*set tie_word_embeddings to false"):
        attach(layout, directory)
    edit_config(directory, tie_word_embeddings=False)
    module: Any = attach(layout, directory)
    assert torch.equal(module.lm_head.weight, module.model.embed_tokens.weight + 1)
