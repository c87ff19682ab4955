"""vLLM's own model classes and our loader, without an engine, in a process of their own.

    python -m tests.layout_host WORK    # a request a line on stdin, in JSON; answers on stdout

Importing vLLM takes 10 s, loading a small model 0.2 s: so one process loads every architecture of
`test_architectures.py` and keeps it, while the tests, in their own process, play the trainer.
"""

import gc
import hashlib
import json
import os
import signal
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from apollo.weights.layout import Block, LayoutError, WeightLayout
from apollo.weights.memory import place
from apollo.weights.pieces import address_of
from apollo.weights.plugin import LOAD_FORMAT, register
from apollo.weights.record import Recorder, Span

NUM_RANKS = 2
RANK_TIMEOUT_S = 120
"""A rank that waits for one that has failed ends by itself."""


def without_torchvision() -> None:
    """Let vLLM's file of Qwen3.5 import: it holds the vision model too, which is never made."""
    functional = types.ModuleType("torchvision.transforms.v2.functional")
    functional.__dict__["InterpolationMode"] = None
    package = types.ModuleType("torchvision.transforms.v2")
    package.__dict__["functional"] = functional
    sys.modules |= {module.__name__: module for module in (functional, package)}


without_torchvision()

from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.distributed.parallel_state import (  # noqa: E402
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (  # noqa: E402
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.model_loader import get_model_loader  # noqa: E402
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader  # noqa: E402
from vllm.model_executor.model_loader.utils import initialize_model  # noqa: E402
from vllm.model_executor.models import ModelRegistry  # noqa: E402
from vllm.utils.torch_utils import set_default_torch_dtype  # noqa: E402


class Host:
    """Loads models by name of their directory under `work` and keeps them."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._models: dict[str, nn.Module] = {}

    def ranks(self, names: list[str]) -> None:
        """Record the layouts of every rank of a tensor-parallel engine: NAME.rankN.layout.

        A process each, as in vLLM; forked, so that vLLM is not imported again. Comes first.
        """
        ranks = []
        for rank in range(NUM_RANKS):
            pid = os.fork()
            if pid == 0:
                status = 1
                signal.alarm(RANK_TIMEOUT_S)
                try:
                    self._as_rank(rank, names)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            ranks.append(pid)
        for pid in ranks:
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    def _as_rank(self, rank: int, names: list[str]) -> None:
        # Ranks that disagree on it share no memory: they only load, and have nothing to say.
        os.environ["VLLM_DIST_IDENT"] = str(rank)
        for name in names:
            config = self._config(name, "float32", tensor_parallel_size=NUM_RANKS)
            if not torch.distributed.is_initialized():
                self._join_group("ranks", NUM_RANKS, rank)
            with set_current_vllm_config(config), set_default_torch_dtype(torch.float32):
                model = initialize_model(config)
            blocks, spans = place(model, self._work / f"{name}.rank{rank}.weights")
            loader: Any = DefaultModelLoader(config.load_config)
            weights = loader.get_all_weights(config.model_config, model)
            views, padding = record(model, spans, weights, is_rank=True)
            layout = WeightLayout.checked("cpu", blocks, views, padding)
            layout.save(self._work / f"{name}.rank{rank}.layout")

    def load(self, name: str, dtype: str, kernels: str, num_ranks: int = 1) -> str | None:
        """Load NAME with our loader: NAME.weights and NAME.layout. Returns the refusal, if any.

        `kernels` is what becomes of experts after loading: "own" is what vLLM has for this CPU;
        "kept" leaves them as Triton's kernels do; "shuffled" turns them round in place, as
        FlashInfer's do.
        """
        config = self._config(
            name,
            dtype,
            load_format=LOAD_FORMAT,
            tensor_parallel_size=num_ranks,
            model_loader_extra_config={
                kind: str(self._work / f"{name}.{kind}")
                for kind in ("weights", "layout", "progress")
            },
        )
        loader: Any = get_model_loader(config.load_config)
        try:
            with self._in_group(config), expert_kernels(kernels):
                self._models[name] = loader.load_model(config, config.model_config)
        except LayoutError as error:
            return str(error)
        return None

    def digests(self, name: str) -> dict[str, str]:
        """SHA-256 of every parameter, as the engine would compute with it."""
        return {
            key: hashlib.sha256(bytes_of(parameter)).hexdigest()
            for key, parameter in self._models[name].named_parameters()
        }

    def packed(self, name: str) -> list[str]:
        """Linear layers that would compute with something else than their weight."""
        return [
            key
            for key, module in self._models[name].named_modules()
            if getattr(module, "cpu_linear", nn.functional.linear) is not nn.functional.linear
        ]

    def plan(self, name: str) -> int:
        """Record NAME's layout on the meta device; returns the bytes that this process grew by."""
        config = self._config(name, "bfloat16")
        process = psutil.Process()
        before = process.memory_info().rss
        with self._in_group(config), set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
            model = initialize_model(config)
        spans, offset = [], 0
        leave_memory(model)
        for key, parameter in model.named_parameters():
            spans.append(Span(key, 0, address_of(parameter), parameter.nbytes, offset))
            offset += parameter.nbytes
        views, padding = record(model, tuple(spans), checkpoint_of(self._work / name))
        layout = WeightLayout.checked("meta", (Block("", offset),), views, padding)
        layout.save(self._work / f"{name}.layout")
        grown: int = process.memory_info().rss - before
        return grown

    def _config(self, name: str, dtype: str, **arguments: Any) -> Any:
        directory = self._work / name
        (architecture,) = json.loads((directory / "config.json").read_text())["architectures"]
        # A class that is known needs no inspection, which vLLM does in another process in 6 s.
        ModelRegistry.register_model(
            architecture, ModelRegistry.models[architecture].load_model_cls()
        )
        arguments = {
            "model": str(directory),
            "dtype": dtype,
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "max_model_len": 64,
            **arguments,
        }
        return EngineArgs(**arguments).create_engine_config()

    @contextmanager
    def _in_group(self, config: VllmConfig) -> Iterator[None]:
        if not torch.distributed.is_initialized():
            self._join_group("alone", 1, 0)
        with set_current_vllm_config(config):
            yield

    def _join_group(self, name: str, size: int, rank: int) -> None:
        # Without a model in the configuration every group is made, that of experts too.
        parallel = ParallelConfig(tensor_parallel_size=size)
        with set_current_vllm_config(VllmConfig(parallel_config=parallel)):
            meeting = f"file://{self._work / name}.group"
            init_distributed_environment(size, rank, meeting, rank, "gloo")
            ensure_model_parallel_initialized(size, 1)


def record(
    model: nn.Module, spans: tuple[Span, ...], weights: Any, *, is_rank: bool = False
) -> Any:
    """Views and padding, as `SharedLoader.load_weights` finds them."""
    recorder = Recorder(spans, is_rank=is_rank)
    load: Any = model.load_weights
    with recorder, torch.no_grad():
        load(recorder.watch(weights))
    return recorder.views()


def checkpoint_of(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors without memory of what transformers would save; A_log in float32."""
    from apollo.weights.attach import empty_module

    for name, tensor in empty_module(directory, torch.bfloat16).state_dict().items():
        yield name, tensor.float() if name.endswith("A_log") else tensor


def leave_memory(model: nn.Module) -> None:
    """Move to the meta device what vLLM puts on its own device regardless: the gated norms."""
    for key, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            owner, _, leaf = key.rpartition(".")
            empty = nn.Parameter(parameter.to("meta"), requires_grad=False)
            model.get_submodule(owner)._parameters[leaf] = empty


@contextmanager
def expert_kernels(kernels: str) -> Iterator[None]:
    """Replace what vLLM does to experts after loading, unless it is to do its own."""
    own = UnquantizedFusedMoEMethod.process_weights_after_loading

    def keep(method: Any, layer: Any) -> None:
        pass

    def shuffle(method: Any, layer: Any) -> None:
        layer.w13_weight.data.copy_(layer.w13_weight.data.roll(1, dims=1))

    chosen: dict[str, Callable[[Any, Any], None]] = {
        "own": own,
        "kept": keep,
        "shuffled": shuffle,
    }
    UnquantizedFusedMoEMethod.process_weights_after_loading = chosen[kernels]
    try:
        yield
    finally:
        UnquantizedFusedMoEMethod.process_weights_after_loading = own


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def main() -> None:
    # As vLLM's own CPU worker does: there is no accelerator to be emptied.
    torch.accelerator.empty_cache = lambda: None
    register()
    gc.freeze()  # The loader collects garbage; what was imported is none.
    host = Host(Path(sys.argv[1]))
    for line in sys.stdin:
        what, arguments = json.loads(line)
        print("ANSWER", json.dumps(getattr(host, what)(**arguments)), flush=True)


if __name__ == "__main__":
    main()
