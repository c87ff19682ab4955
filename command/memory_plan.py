"""What a cell would take, by role, before it is booted: arithmetic over configuration and settings.

    weights        engine's, shared with the trainer        config.json, dtype
    KV cache       engine                                   engine.kv_cache_bytes
    optimizer      trainer                                  rules of the tensors, trainer.rank
    step           trainer, at most                         trainer.max_step_tokens
    commit         checkpoint, while it lasts               a second copy, in host memory
    libraries      all processes                            seen, not computed

Which of it lies on the GPU, and which on the host, follows from the device.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from actors.errors import SettingsError
from actors.home import GIB, MIB
from command.finding import Finding, error, ok, warning
from command.machine import available_bytes

if TYPE_CHECKING:
    from actors.settings import Settings
    from apollo.learning.footprint import Footprint

LIBRARY_BYTES: Final = 3 * GIB
"""Of a cell's processes, without what is computed here: vLLM's, the actors', Ray's and Serve's."""
CUDA_CONTEXT_BYTES: Final = 512 * MIB
"""Of each of the two processes that compute on the GPU, as a rule."""
DTYPES: Final = ("float32", "bfloat16")


@dataclass(frozen=True)
class Share:
    """One role's part, in bytes."""

    role: str
    what: str
    size_bytes: int
    is_on_device: bool
    is_passing: bool = False
    """Taken for a while only."""


@dataclass(frozen=True)
class Plan:
    """Everything a cell would take."""

    device: str
    dtype: str
    num_parameters: int
    shares: tuple[Share, ...]

    def total(self, is_on_device: bool) -> int:
        return sum(each.size_bytes for each in self.shares if each.is_on_device is is_on_device)

    @property
    def shared_bytes(self) -> int:
        """What lies in /dev/shm: on a CPU the weights; the optimizer's state while it is kept."""
        named = {each.what: each.size_bytes for each in self.shares}
        state = named["optimizer state"]
        return state if self.device == "cuda" else named["weights"] + state

    @property
    def disk_bytes(self) -> int:
        """Two complete directories, the one that is being written, and some generations."""
        (weights,) = (each.size_bytes for each in self.shares if each.what == "weights")
        return 4 * weights

    def as_json(self) -> dict[str, Any]:
        shares = [
            {
                "role": each.role,
                "what": each.what,
                "size_bytes": each.size_bytes,
                "is_on_device": each.is_on_device,
                "is_passing": each.is_passing,
            }
            for each in self.shares
        ]
        return {
            "device": self.device,
            "dtype": self.dtype,
            "num_parameters": self.num_parameters,
            "shares": shares,
            "device_bytes": self.total(True),
            "host_bytes": self.total(False),
        }


def make_plan(settings: "Settings", has_gpu: bool) -> Plan:
    """Raises SettingsError for a model whose configuration cannot be had or is not known."""
    is_cuda = settings.device == "cuda" or (settings.device == "auto" and has_gpu)
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if is_cuda else "float32"
    with tempfile.TemporaryDirectory(prefix="reverie-doctor-") as scratch:
        config = _config_dir(settings, Path(scratch))
        found = _footprint(settings, config, dtype)
    trainer = settings.trainer
    keeps_projections = trainer.kernels != "triton" and not (trainer.kernels == "auto" and is_cuda)
    step = found.step
    shares = [
        Share("engine", "weights", found.weights, is_cuda),
        Share("engine", "KV cache", settings.engine.kv_cache_bytes, is_cuda),
        Share("trainer", "optimizer state", found.state, is_cuda),
        Share("trainer", "a step, at most", step.total, is_cuda, is_passing=True),
        Share("checkpoint", "a commit", found.weights, False, is_passing=True),
        Share("all", "libraries", LIBRARY_BYTES, False),
    ]
    if keeps_projections:
        shares.insert(3, Share("trainer", "projections", found.projections, is_cuda))
    if is_cuda:
        shares.append(Share("engine, trainer", "CUDA contexts", 2 * CUDA_CONTEXT_BYTES, True))
    return Plan("cuda" if is_cuda else "cpu", dtype, found.num_parameters, tuple(shares))


def check(plan: Plan, device_bytes: int | None) -> Iterator[Finding]:
    """Whether it fits; `device_bytes` is the GPU's memory, if there is one."""
    host, there = plan.total(False), available_bytes()
    told = f"needs {host / GIB:.1f} GiB, {there / GIB:.1f} GiB are available"
    remedy = "lower engine.kv_cache_bytes, trainer.max_step_tokens or trainer.rank"
    steady = sum(s.size_bytes for s in plan.shares if not s.is_on_device and not s.is_passing)
    if steady > there:
        yield error("host memory", told, remedy)
    elif host > there:
        yield warning("host memory", f"{told}; the longest step or a commit may not fit", remedy)
    else:
        yield ok("host memory", told)
    if plan.device == "cuda" and device_bytes is not None:
        wanted = plan.total(True)
        told = f"needs {wanted / GIB:.1f} of the GPU's {device_bytes / GIB:.1f} GiB"
        fits = wanted <= device_bytes
        more = ", or --set trainer.checkpoint_layers=true"
        yield ok("GPU memory", told) if fits else error("GPU memory", told, remedy + more)
    if plan.device == "cpu" and plan.dtype == "bfloat16":
        yield warning(
            "dtype",
            "vLLM's bfloat16 attention on a CPU with AMX gives wrong tokens on some machines",
            "--set dtype=float32",
        )


def _footprint(settings: "Settings", config: Path, dtype: str) -> "Footprint":
    from apollo.learning.footprint import footprint

    trainer = settings.trainer
    tokens = min(trainer.max_step_tokens, settings.engine.max_model_len)
    try:
        return footprint(
            config,
            dtype,
            tokens,
            settings.engine.max_model_len - tokens,
            train_embeddings=trainer.train_embeddings,
            checkpoint_layers=trainer.checkpoint_layers,
            rank=trainer.rank,
            clip=trainer.clip,
            rounding=trainer.rounding,
        )
    except Exception as failed:  # transformers raises of many kinds.
        raise SettingsError(
            f"model={settings.model}: its configuration cannot be read: {failed}"
        ).about("model") from None


def _config_dir(settings: "Settings", scratch: Path) -> Path:
    """A directory with the model's config.json: adopted, given, known, or fetched (some KB)."""
    from apollo.weights import smollm2
    from apollo.weights.adopt import model_name
    from apollo.weights.model_directory import AdoptionError

    try:
        name = model_name(settings.model, settings.home)
    except AdoptionError as failed:
        raise SettingsError(str(failed)).about("model") from None
    for place in (settings.home / "models" / name, Path(settings.model).expanduser()):
        if (place / "config.json").is_file():
            return place
    if settings.model == smollm2.ALIAS:
        (scratch / "config.json").write_text(json.dumps(smollm2.CONFIG))
        return scratch
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(settings.model, "config.json")).parent
    except Exception as failed:
        reason = str(failed).splitlines()[0]
        raise SettingsError(
            f"model={settings.model}: its config.json cannot be had ({reason}); name a directory"
        ).about("model") from None
