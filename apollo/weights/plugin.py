"""What vLLM finds through its entry points: the load format, and calls into the engine process.

`register` is named in pyproject.toml (`vllm.general_plugins`) and runs in every vLLM process.
"""

import hashlib
import multiprocessing
import os
import threading
import time
from typing import Any, Final

import torch
from torch import nn

LOAD_FORMAT: Final = "reverie"
WORKER_EXTENSION: Final = "apollo.weights.plugin.WorkerExtension"
PARENT_CHECK_INTERVAL_S: Final = 0.5
FOLLOWER: Final = "follow-parent"


def register() -> None:
    """Register the load format and tie the process's life to its parent's. Idempotent."""
    from vllm.model_executor.model_loader import (
        _LOAD_FORMAT_TO_MODEL_LOADER,
        register_model_loader,
    )

    if LOAD_FORMAT not in _LOAD_FORMAT_TO_MODEL_LOADER:
        from apollo.weights.loader import SharedLoader

        register_model_loader(LOAD_FORMAT)(SharedLoader)
    parent = multiprocessing.parent_process()
    is_followed = any(thread.name == FOLLOWER for thread in threading.enumerate())
    if parent is not None and parent.pid is not None and not is_followed:
        follow = threading.Thread(target=_follow, args=(parent.pid,), daemon=True, name=FOLLOWER)
        follow.start()


def _follow(parent: int) -> None:
    """End this process when its parent is gone: a killed actor must not leave an engine behind."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_INTERVAL_S)
    os._exit(1)


class WorkerExtension:
    """Mixed into vLLM's worker; called through `collective_rpc`; plain arguments and results."""

    model_runner: Any

    def reverie_digest(self, name: str) -> str:
        """SHA-256 of one engine parameter's bytes, as the engine computes with them right now."""
        model: nn.Module = self.model_runner.get_model()
        tensor = dict(model.named_parameters())[name].detach().contiguous().cpu()
        return hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
