"""vLLM's default loader, with its parameters in shared memory and its copies recorded.

Runs in vLLM's engine process, a child that never executes our start-up code: `plugin.py` is how
vLLM finds it. Owns the order below, and refuses any model for which a step does not hold.

    create model -> place parameters in shared memory -> load, recording copies -> layout
        -> vLLM's own post-processing -> check that no parameter moved
        -> compare every view with the checkpoint, bit for bit -> write the layout

The comparison comes last: some kernels shuffle a weight in place (FlashInfer's experts do), and
what moved inside a parameter has not moved as far as its address tells.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from apollo.weights.layout import LayoutError, WeightLayout
from apollo.weights.memory import Mapping, place
from apollo.weights.record import Recorder, Span

_UNQUANTISED: Final = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


class SharedLoader(DefaultModelLoader):
    """Load format `reverie`; its extra config names the files `weights`, `layout`, `progress`."""

    def __init__(self, load_config: LoadConfig) -> None:
        extra = dict(load_config.model_loader_extra_config or {})
        self._weights_path = Path(extra.pop("weights"))
        self._layout_path = Path(extra.pop("layout"))
        self._progress_path = Path(extra.pop("progress"))
        self._recorder: Recorder | None = None
        self._spans: tuple[Span, ...] = ()
        self._layout: WeightLayout | None = None
        super().__init__(
            dataclasses.replace(
                load_config, load_format="safetensors", model_loader_extra_config=extra
            )
        )

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        """Load as vLLM does; raises LayoutError with a tensor's name if one copy is impossible."""
        refuse_configuration(vllm_config)
        model: nn.Module = super().load_model(vllm_config, model_config, prefix)
        layout = self._layout
        assert layout is not None
        check_unmoved(model, self._spans)
        served = (
            Mapping(layout, is_writable=False).tensors()
            if layout.device == "cpu"
            else _views_here(model, self._spans, layout)
        )
        compare_with_checkpoint(served, super().get_all_weights(model_config, model))
        if layout.device == "cpu":
            compute_in_place(model)
        layout.save(self._layout_path)
        self._tell("engine")
        return model

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Place, load, record; leaves the layout for `load_model` to compare and publish."""
        refuse_quantised(model)
        self._tell("weights")
        blocks, self._spans = place(model, self._weights_path)
        self._recorder = Recorder(self._spans)
        with self._recorder:
            super().load_weights(model, model_config)
        self._tell("layout")
        views, padding = self._recorder.views()
        self._recorder = None
        device = next(model.parameters()).device.type
        self._layout = WeightLayout.checked(device, blocks, views, padding)
        for module in model.modules():
            if isinstance(module, LinearBase):
                # Otherwise vLLM's CPU back end repacks the weight and deletes the original.
                module._cpu_skip_gemm_dispatch = True

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Any:
        """The checkpoint, observed while a recorder is at work."""
        weights = super().get_all_weights(model_config, model)
        return weights if self._recorder is None else self._recorder.watch(weights)

    def _tell(self, stage: str) -> None:
        with self._progress_path.open("a") as progress:
            progress.write(stage + "\n")


def refuse_configuration(vllm_config: VllmConfig) -> None:
    """Raise LayoutError for settings under which memory cannot be shared or taught."""
    if vllm_config.model_config.enable_sleep_mode:
        raise LayoutError("sleep mode: its allocator cannot export memory; start without it")
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        # As torch reads it: blanks do not count.
        if "expandable_segments:true" in "".join(os.environ.get(variable, "").lower().split()):
            raise LayoutError(f"{variable}: expandable_segments cannot be exported; unset it")
    parallel = vllm_config.parallel_config
    if parallel.world_size != 1:
        raise LayoutError(f"parallel size {parallel.world_size}: one cell is one device")
    if vllm_config.model_config.quantization is not None:
        raise LayoutError(
            f"quantization={vllm_config.model_config.quantization!r}: "
            "quantised weights cannot be taught in place; use the unquantised model"
        )


def refuse_quantised(model: nn.Module) -> None:
    """Raise LayoutError with the name of the first layer whose weights are not plain."""
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is None or isinstance(method, _UNQUANTISED):
            continue
        if "Unquantized" not in type(method).__name__ and list(module.parameters(recurse=False)):
            raise LayoutError(
                f"{name}: is quantised ({type(method).__name__}); "
                "quantised weights cannot be taught in place; use the unquantised model"
            )


def compare_with_checkpoint(served: dict[str, torch.Tensor], weights: Any) -> None:
    """Raise LayoutError with the first tensor whose bits differ from the checkpoint's."""
    left = set(served)
    for name, tensor in weights:
        if name not in served:
            raise LayoutError(f"{name}: is in the checkpoint but not in the layout")
        view = served[name]
        if view.shape != tensor.shape or view.dtype != tensor.dtype:
            raise LayoutError(
                f"{name}: {tuple(view.shape)} {view.dtype} in the engine, "
                f"{tuple(tensor.shape)} {tensor.dtype} in the checkpoint"
            )
        if not torch.equal(_bits(view), _bits(tensor.to(view.device))):
            raise LayoutError(
                f"{name}: differs from the checkpoint; its map is wrong, or vLLM shuffled it for "
                f"a kernel{_remedy(name)}"
            )
        left.discard(name)
    if left:
        raise LayoutError(f"{min(left)}: is in the layout but not in the checkpoint")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes as integers, so that NaN equals itself and -0.0 differs from 0.0."""
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def _views_here(
    model: nn.Module, spans: tuple[Span, ...], layout: WeightLayout
) -> dict[str, torch.Tensor]:
    """As `Mapping.tensors`, in the exporting process, which cannot open its own CUDA handles."""
    tensors = dict(model.named_parameters())
    storages = {span.block: tensors[span.name].untyped_storage() for span in spans}
    return {
        view.name: torch.empty(0, dtype=getattr(torch, view.dtype), device=layout.device).set_(
            storages[view.block],
            view.offset_bytes // getattr(torch, view.dtype).itemsize,
            view.shape,
            view.stride,
        )
        for view in layout
    }


def check_unmoved(model: nn.Module, spans: tuple[Span, ...]) -> None:
    """Raise LayoutError with the first parameter that vLLM's post-processing moved or repacked."""
    tensors = dict(model.named_parameters())
    for span in spans:
        tensor = tensors.get(span.name)
        if tensor is None or tensor.data_ptr() != span.address:
            raise LayoutError(
                f"{span.name}: vLLM repacked it after loading or left it out, so the engine would "
                f"compute with other memory; this layer type is not supported{_remedy(span.name)}"
            )


def _remedy(name: str) -> str:
    """What helps where only some of vLLM's kernels are at fault."""
    if "experts" not in name:
        return ""
    return "; experts are served in place by Triton's kernels: a GPU, and --moe-backend triton"


def compute_in_place(model: nn.Module) -> None:
    """Make embedding and lm_head compute with their weight instead of a packed copy of it (CPU)."""
    for module in model.modules():
        if hasattr(module, "cpu_linear"):
            object.__setattr__(module, "cpu_linear", torch.nn.functional.linear)
