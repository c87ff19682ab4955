"""What the loader refuses before anything is served: by the layer's, setting's or tensor's name.

The layers carry vLLM's own quantised methods; they are made without their kernels, which is all
that the refusal looks at.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from apollo.weights.layout import LayoutError
from apollo.weights.loader import (
    check_unmoved,
    compare_with_checkpoint,
    refuse_configuration,
    refuse_quantised,
)
from apollo.weights.memory import place

# Quantised layers.


def layer_with(method: type) -> nn.Module:
    """A linear layer as vLLM leaves it after construction, with the given method."""
    layer: nn.Module = LinearBase.__new__(LinearBase)
    nn.Module.__init__(layer)
    layer.register_parameter("weight", nn.Parameter(torch.zeros(4, 4)))
    layer.quant_method = object.__new__(method)
    return layer


def model_with(method: type) -> nn.Module:
    model = nn.Module()
    model.embed = nn.Embedding(4, 4)
    model.plain = layer_with(UnquantizedLinearMethod)
    model.layers = nn.ModuleList([nn.Module(), nn.Module()])
    model.layers[1].down_proj = layer_with(method)
    return model


@pytest.mark.parametrize(
    "method", [Fp8LinearMethod, AutoGPTQLinearMethod, CompressedTensorsLinearMethod]
)
def test_quantised_layer_is_refused_by_name(method: type) -> None:
    match = rf"^layers\.1\.down_proj: is quantised \({method.__name__}\)"
    with pytest.raises(LayoutError, match=match):
        refuse_quantised(model_with(method))


@pytest.mark.parametrize("method", [UnquantizedLinearMethod, UnquantizedEmbeddingMethod])
def test_plain_layers_are_accepted(method: type) -> None:
    refuse_quantised(model_with(method))


# Settings.


def configuration(**changes: Any) -> Any:
    """What the loader reads of a VllmConfig."""
    values = {"enable_sleep_mode": False, "quantization": None, "world_size": 1} | changes
    return SimpleNamespace(
        model_config=SimpleNamespace(
            enable_sleep_mode=values["enable_sleep_mode"], quantization=values["quantization"]
        ),
        parallel_config=SimpleNamespace(world_size=values["world_size"]),
    )


@pytest.fixture(autouse=True)
def no_allocator_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(variable, raising=False)


def test_plain_configuration_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:False,max_split_size_mb:64")
    refuse_configuration(configuration())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"enable_sleep_mode": True}, r"^sleep mode: "),
        ({"quantization": "fp8"}, r"^quantization='fp8': .*use the unquantised model"),
        ({"world_size": 2}, r"^parallel size 2: "),
    ],
    ids=["sleep", "quantisation", "parallel"],
)
def test_configuration_is_refused_by_name(change: dict[str, Any], match: str) -> None:
    with pytest.raises(LayoutError, match=match):
        refuse_configuration(configuration(**change))


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize(
    "value", ["expandable_segments:True", "max_split_size_mb:64, expandable_segments : True"]
)
def test_expandable_segments_are_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(LayoutError, match=rf"^{variable}: expandable_segments"):
        refuse_configuration(configuration())


def test_vllm_still_has_the_settings_that_are_read() -> None:
    from vllm.config import ModelConfig, ParallelConfig

    assert {"enable_sleep_mode", "quantization"} <= set(ModelConfig.__dataclass_fields__)
    assert ParallelConfig().world_size == 1


# A parameter that moved after it was mapped.


def test_parameter_that_was_repacked_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    _, spans = place(model, tmp_path / "weights")
    check_unmoved(model, spans)
    weight = model.get_parameter("1.weight")
    weight.data = weight.data.t().contiguous()
    with pytest.raises(LayoutError, match=r"^1\.weight: vLLM repacked it"):
        check_unmoved(model, spans)


def test_parameter_that_was_deleted_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    _, spans = place(model, tmp_path / "weights")
    del model[0].bias
    with pytest.raises(LayoutError, match=r"^0\.bias: vLLM repacked it"):
        check_unmoved(model, spans)


# A map that is wrong: every view is compared with the checkpoint, bit for bit.

NAN = float("nan")


def checkpoint() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "k_proj": torch.randn(4, 6, generator=generator),
        "v_proj": torch.randn(4, 6, generator=generator),
        "norm": torch.tensor([1.0, NAN, -0.0, float("inf")]),
        "half": torch.randn(3, generator=generator).to(torch.bfloat16),
    }


def test_right_map_is_accepted_with_nan_and_negative_zero() -> None:
    compare_with_checkpoint(
        {name: tensor.clone() for name, tensor in checkpoint().items()}, checkpoint().items()
    )


def test_columns_of_a_wider_parameter_are_compared_too() -> None:
    wide = torch.zeros(4, 9)
    wide[:, 2:8] = checkpoint()["k_proj"]
    served = checkpoint() | {"k_proj": wide[:, 2:8]}
    compare_with_checkpoint(served, checkpoint().items())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("k_proj", lambda served: served["v_proj"]),
        ("k_proj", lambda served: served["k_proj"].view(6, 4).t().contiguous()),
        ("norm", lambda served: torch.tensor([1.0, NAN, 0.0, float("inf")])),
        ("norm", lambda served: torch.tensor([1.0, 2.0, -0.0, float("inf")])),
        ("half", lambda served: served["half"] * (1 + 2**-7)),
    ],
    ids=["swapped", "transposed", "sign of zero", "NaN", "last bit"],
)
def test_wrong_map_is_refused_by_name(
    name: str, change: Callable[[dict[str, torch.Tensor]], torch.Tensor]
) -> None:
    served = checkpoint()
    served[name] = change(served)
    with pytest.raises(LayoutError, match=rf"^{name}: differs from the checkpoint"):
        compare_with_checkpoint(served, checkpoint().items())


def test_other_shape_is_refused_by_name() -> None:
    served = checkpoint() | {"k_proj": checkpoint()["k_proj"].view(6, 4)}
    with pytest.raises(LayoutError, match=r"^k_proj: \(6, 4\) .* \(4, 6\)"):
        compare_with_checkpoint(served, checkpoint().items())


def test_other_dtype_is_refused_by_name() -> None:
    served = checkpoint() | {"half": checkpoint()["half"].float()}
    with pytest.raises(LayoutError, match=r"^half: .*float32 in the engine.*bfloat16"):
        compare_with_checkpoint(served, checkpoint().items())


def test_tensor_that_is_missing_on_either_side_is_refused_by_name() -> None:
    served = checkpoint()
    del served["norm"]
    with pytest.raises(LayoutError, match=r"^norm: is in the checkpoint but not in the layout"):
        compare_with_checkpoint(served, checkpoint().items())
    with pytest.raises(LayoutError, match=r"^extra: is in the layout but not in the checkpoint"):
        served = checkpoint() | {"extra": torch.ones(1)}
        compare_with_checkpoint(served, checkpoint().items())
