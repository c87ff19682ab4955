"""Triton's programs compiled for GPUs that need not be there; see `test_triton_kernels`.

Triton's driver is replaced by one that names a GPU, and every launch by the compilation that it
would begin with, down to machine code. What nothing computed, the host cannot have needed.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from apollo.optim.changes import make_map
from apollo.optim.optimizer import Apollo
from apollo.optim.routing import matrix_shape
from apollo.optim.triton_kernels import TritonKernels
from tests.test_apollo_device import PRECISIONS, SETTINGS, Watch, kind_of

H100, B200 = 90, 100
SHARED_BYTES = 227 * 1024
"""Shared memory that one program may have on either."""


class Launches:
    """What would have been launched."""

    def __init__(self, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.programs: dict[str, Any] = {}
        target = GPUTarget("cuda", capability, 32)
        driver.set_active(
            SimpleNamespace(
                get_current_target=lambda: target,
                get_current_device=lambda: capability,
                get_current_stream=lambda device: 0,
            )
        )
        run = JITFunction.run

        def compile_only(program: Any, *args: Any, **kwargs: Any) -> None:
            compiled = run(program, *args, **kwargs | {"warmup": True})
            self.programs[compiled.name] = compiled

        monkeypatch.setattr(JITFunction, "run", compile_only)

    def step(self, shape: tuple[int, ...], dtype: torch.dtype, **settings: Any) -> None:
        """One step, watched: the host reads no value and makes no tensor of the weight's size."""
        param = Parameter(torch.ones(shape, dtype=dtype))
        changed = {"lm_head.weight": make_map(*matrix_shape(shape), param.device)}
        settings |= {"kernels": TritonKernels(), "changed": changed}
        optimizer = Apollo([("lm_head.weight", param)], **settings)
        for num_allowed in (None, 0):  # the first step makes the state
            with Watch(param, param, optimizer) as watch:
                optimizer.begin_step()
                optimizer.step_parameter(param, param.detach())
                optimizer.end_step()
            assert num_allowed is None or watch.peak <= num_allowed


@pytest.mark.parametrize("settings", SETTINGS, ids=kind_of)
@pytest.mark.parametrize(
    ("capability", "precision"), [(B200, "stochastic"), *((H100, each) for each in PRECISIONS)]
)
def test_programs_compile_and_the_host_reads_nothing(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], capability: int, precision: str
) -> None:
    launches = Launches(capability, monkeypatch)
    dtype, rounding = PRECISIONS[precision]
    launches.step((256, 512), dtype, rounding=rounding, weight_decay=0.1, **settings)
    assert {"measure", "judge", "limit", "write"} <= set(launches.programs)
    for compiled in launches.programs.values():
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= SHARED_BYTES


@pytest.mark.parametrize(("capability", "multiply"), [(H100, "wgmma"), (B200, "tcgen05.mma")])
@pytest.mark.parametrize("rank", [64, 256])
@pytest.mark.parametrize("shape", [(512, 1024), (1024, 512)], ids=str)
def test_bfloat16_is_projected_by_tensor_cores(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    rank: int,
    capability: int,
    multiply: str,
) -> None:
    launches = Launches(capability, monkeypatch)
    launches.step(shape, torch.bfloat16, rank=rank)
    assert multiply in launches.programs["measure"].asm["ptx"]
    assert launches.programs["measure"].metadata.shared <= SHARED_BYTES
