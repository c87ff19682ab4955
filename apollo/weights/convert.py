"""Safetensors files as they lie on disk: what their headers say, and a copy in another dtype.

A tensor at a time passes through memory, never a file. Knows nothing of models or directories.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

DTYPE_NAMES: Final[Mapping[str, str]] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}
"""Types that weights may have: safetensors' word, torch's word."""
BUFFER_DTYPES: Final = frozenset({"I64", "I32", "BOOL"})
"""Types of buffers that belong to a model and are never taught."""

_SIZES: Final[Mapping[str, int]] = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "BOOL": 1,
}  # fmt: skip
_ALIGNMENT: Final = 8


class FileRefused(ValueError):
    """Not a safetensors file, or one with a tensor of a type that cannot be taught."""


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a file: its type in safetensors' word, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its data."""
        size = _SIZES[self.dtype]
        for length in self.shape:
            size *= length
        return size


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """All tensors of a file, without reading their data.

    safetensors itself checks the header for gaps, overlaps and truncation. Raises FileRefused with
    the tensor's name for a quantised or unknown type.
    """
    headers = {}
    try:
        with safe_open(path, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                part = opened.get_slice(name)
                headers[name] = TensorHeader(part.get_dtype(), tuple(part.get_shape()))
    except SafetensorError as error:
        raise FileRefused(f"{path} is damaged or is no safetensors file: {error}") from None
    for name, header in headers.items():
        if header.dtype not in DTYPE_NAMES and header.dtype not in BUFFER_DTYPES:
            raise FileRefused(
                f"{name} in {path} has type {header.dtype}; quantised weights cannot be taught: "
                "take the unquantised model (float32, float16 or bfloat16)"
            )
    return headers


def convert_file(source: Path, target: Path, dtype: str) -> None:
    """Write `source` to `target` with every floating tensor as `dtype`; other tensors as they are.

    `dtype` is "float32" or "bfloat16"; narrowing rounds to nearest. Does not fsync.
    """
    import torch

    headers = read_headers(source)
    (wanted,) = (short for short, name in DTYPE_NAMES.items() if name == dtype)
    planned = {
        name: TensorHeader(wanted if header.dtype in DTYPE_NAMES else header.dtype, header.shape)
        for name, header in headers.items()
    }
    # Widest types first, as safetensors orders them: so every tensor lies aligned.
    order = sorted(planned, key=lambda name: (-_SIZES[planned[name].dtype], name))
    with safe_open(source, framework="pt") as opened, target.open("xb") as file:
        file.write(_encode({name: planned[name] for name in order}, opened.metadata()))
        for name in order:
            tensor = opened.get_tensor(name)
            if planned[name].dtype != headers[name].dtype:
                tensor = tensor.to(getattr(torch, dtype))
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _encode(headers: Mapping[str, TensorHeader], metadata: Mapping[str, str] | None) -> bytes:
    record: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, header in headers.items():
        begin, end = end, end + header.size_bytes
        record[name] = {
            "dtype": header.dtype,
            "shape": list(header.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(record, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
