"""The optimizer's state as a safetensors file: moments, counters, and the step they belong to.

    "NAME/exp_avg", "NAME/exp_avg_sq", ...   one entry per parameter and state tensor
    metadata: step, and the settings that give the tensors their meaning

Loaded into an optimizer of the same settings, training goes on bit for bit where it was, since
projections and rounding noise are drawn again from their seeds.
"""

import json
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from apollo.optim.optimizer import Apollo

MEANING: Final = ("mode", "rank", "update_proj_gap", "scale", "rounding", "seed", "role")
"""Settings without which the tensors mean something else; a learning rate may change."""


class OtherOptimizer(ValueError):
    """The file belongs to an optimizer of other settings or parameters; nothing was changed."""


def save(optimizer: Apollo, path: Path) -> None:
    """Write the state to `path`, a new file. Syncs nothing.

    Raises OSError or SafetensorError on a full disk.
    """
    tensors = {
        f"{optimizer.name_of(param)}/{key}": value.contiguous()
        for param, state in optimizer.state.items()
        for key, value in state.items()
    }
    metadata = {"step": str(optimizer.num_steps), "settings": json.dumps(_meaning(optimizer))}
    save_file(tensors, path, metadata)


def load(optimizer: Apollo, path: Path) -> None:
    """Take over the state in `path`. Raises OtherOptimizer with the optimizer as it was."""
    params = {
        optimizer.name_of(param): param for g in optimizer.param_groups for param in g["params"]
    }
    found: dict[str, dict[str, Any]] = {}
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if json.loads(metadata.get("settings", "null")) != _meaning(optimizer):
                raise OtherOptimizer("the optimizer's settings have changed since it was saved")
            for entry in list(opened.keys()):
                name, _, key = entry.rpartition("/")
                if name not in params:
                    raise OtherOptimizer(f"{name} is not a parameter that is trained now")
                found.setdefault(name, {})[key] = opened.get_tensor(entry)
        step = int(metadata["step"])
    except (SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, OtherOptimizer):
            raise
        raise OtherOptimizer(f"it cannot be read: {error}") from None
    optimizer.state.clear()
    for name, state in found.items():
        param = params[name]
        optimizer.state[param] = {key: value.to(param.device) for key, value in state.items()}
    for group in optimizer.param_groups:
        group["num_steps"] = step


def forget(optimizer: Apollo, num_steps: int) -> None:
    """Begin anew: no moments. The step count never goes back, so that no noise is drawn twice."""
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["num_steps"] = max(num_steps, group["num_steps"])


def _meaning(optimizer: Apollo) -> list[dict[str, Any]]:
    return [{key: group[key] for key in MEANING} for group in optimizer.param_groups]
