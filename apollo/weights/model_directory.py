"""What a model directory must be to be taught; looked at, never written.

Finds the weight files, reads their headers, and refuses by name what is missing, quantised or
damaged. Imports no torch.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from apollo.weights import manifest
from apollo.weights.convert import DTYPE_NAMES, FileRefused, TensorHeader, read_headers

INDEX: Final = "model.safetensors.index.json"
SIDE_FILES: Final = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICENSE*", "NOTICE*")
"""What is kept beside the weights: configuration, tokenizer, chat template, licence."""


class AdoptionError(ValueError):
    """The model cannot be taught, or not under this name; the message says what to do."""


def check_directory(source: Path) -> list[Path]:
    """The weight files of a model directory; raises AdoptionError if it cannot be taught."""
    if not source.exists():
        raise AdoptionError(f"model={str(source)!r} does not exist; give a directory or a hub id")
    if not source.is_dir():
        raise AdoptionError(
            f"{source} is a file; give the directory with its config.json and safetensors files"
        )
    if not (source / "config.json").is_file():
        raise AdoptionError(
            f"{source} has no config.json; give a complete model directory, as save_pretrained "
            "writes it (an adapter must be merged into its model first)"
        )
    config = read_json(source / "config.json")
    for part in (config, *nested_configs(config)):
        if part.get("quantization_config"):
            method = part["quantization_config"].get("quant_method", "an unnamed method")
            raise AdoptionError(
                f"{source} is quantised ({method}); quantised weights cannot be taught: take the "
                "unquantised model"
            )
    return weight_files(source)


def weight_files(source: Path) -> list[Path]:
    """The files that hold the weights, each tensor once: those of the index, or the only one."""
    if (source / INDEX).is_file():
        weight_map: dict[str, str] = read_json(source / INDEX).get("weight_map", {})
        paths = [source / name for name in sorted(set(weight_map.values()))]
        for path in paths:
            if path.parent != source or not path.is_file():
                raise AdoptionError(
                    f"{source} is incomplete: {INDEX} names {path.name}, which is not there; "
                    "download the model again"
                )
        return paths
    found = sorted(source.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise AdoptionError(
            f"{source} has {len(found)} safetensors files and no {INDEX}; save the model again "
            "with save_pretrained"
        )
    if any(source.glob("*.bin")):
        raise AdoptionError(
            f"{source} has its weights as .bin files, which can run code when they are read; "
            "save the model again with save_pretrained(..., safe_serialization=True)"
        )
    raise AdoptionError(f"{source} has no safetensors file; give a complete model directory")


def read_weights(weights: list[Path]) -> dict[str, TensorHeader]:
    """The headers of all tensors, by name; raises AdoptionError for what cannot be taught."""
    headers: dict[str, TensorHeader] = {}
    try:
        for path in weights:
            headers |= read_headers(path)
    except FileRefused as error:
        raise AdoptionError(str(error)) from None
    index = weights[0].with_name(INDEX)
    if index.is_file():
        missing = set(read_json(index)["weight_map"]) - set(headers)
        if missing:
            raise AdoptionError(
                f"{index.parent} is incomplete: no file holds {min(missing)}; "
                "download the model again"
            )
    if not any(header.dtype in DTYPE_NAMES for header in headers.values()):
        raise AdoptionError(f"{weights[0].parent} holds no floating-point weights")
    return headers


def main_dtype(headers: Mapping[str, TensorHeader]) -> str:
    """The type that most bytes of the weights have; a few tensors may be kept in a wider one."""
    size_of: Counter[str] = Counter()
    for header in headers.values():
        if header.dtype in DTYPE_NAMES:
            size_of[DTYPE_NAMES[header.dtype]] += header.size_bytes
    return size_of.most_common(1)[0][0]


def side_files(source: Path) -> list[Path]:
    """The files to keep beside the weights, the manifest excepted."""
    found = {path for pattern in SIDE_FILES for path in source.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.name != manifest.FILE_NAME)


def has_chat_template(directory: Path) -> bool:
    """Whether the tokenizer can lay out a conversation."""
    if (directory / "chat_template.jinja").exists() or (directory / "chat_template.json").exists():
        return True
    path = directory / "tokenizer_config.json"
    return path.exists() and bool(read_json(path).get("chat_template"))


def nested_configs(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts of a composite configuration (text, vision), each with a type of its own."""
    named = (config.get("text_config"), config.get("vision_config"))
    return [part for part in named if isinstance(part, dict)]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model's file; raises AdoptionError if it is damaged."""
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise AdoptionError(f"{path} is damaged: {error}; download the model again") from None
    if not isinstance(record, dict):
        raise AdoptionError(f"{path} is damaged: it holds no JSON object")
    return record
