"""The CUDA update in Triton, as far as a machine without a GPU can tell, in processes of their own.

vLLM's CPU build fails where `triton` can be imported, and Triton decides at its import whether it
interprets. So it lies in a directory of its own, which `make test` fills (another one is named in
REVERIE_TEST_TRITON), and only these processes have it on their path.
"""

import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from apollo.optim import choose
from apollo.optim.choose import choose_kernels
from apollo.optim.update import TorchKernels

ROOT = Path(__file__).parents[1]
TRITON = Path(os.environ.get("REVERIE_TEST_TRITON") or Path(sys.prefix, "triton"))
TIMEOUT_S = 280


def run_with_triton(file: str, **environment: str) -> None:
    """Pass if all tests of `file` do."""
    assert (TRITON / "triton").is_dir(), (
        f"there is no triton in {TRITON}; `make test` installs it: "
        f"pip install --no-deps --target {TRITON} -r requirements-triton.lock"
    )
    paths = [str(TRITON), *filter(None, [os.environ.get("PYTHONPATH")])]
    answer = subprocess.run(
        # `conftest` is about cells, and takes long to import.
        [sys.executable, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", file],
        cwd=ROOT,
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_interpreted_programs_agree_with_torch_and_the_oracle() -> None:
    run_with_triton("tests/interpreted_kernels.py", TRITON_INTERPRET="1")


def test_programs_compile_for_cuda_and_the_host_never_waits(tmp_path: Path) -> None:
    """Machine code for an H100 and a B200; it has not run on either."""
    cache = str(tmp_path / "cache")
    run_with_triton("tests/cuda_programs.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=cache)


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(choose, "find_spec", lambda name: ModuleSpec(name, None))
    with pytest.raises(ValueError, match="kernels='triton'.* on cpu.*use kernels='auto'"):
        choose_kernels("triton", torch.device("cpu"))
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="kernels='triton'.*not installed.*use kernels='auto'"):
        choose_kernels("triton", torch.device("cuda"))


def test_auto_is_torch_where_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    for device in ("cpu", "cuda"):
        assert isinstance(choose_kernels("auto", torch.device(device)), TorchKernels)
