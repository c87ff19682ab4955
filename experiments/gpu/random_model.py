"""A model of the shapes of a real one, with random weights, for measuring without a download.

    .venv/bin/python -m experiments.gpu.random_model 8b DIRECTORY --like ADOPTED --device cuda

Words come from the model at `--like`: its tokenizer and chat template are copied, and whoever asks
in its words is understood by any of these, in noise. Written in bfloat16, a shard of 4 GB at a
time, beside the shapes' own configuration:

    smollm2     that of `--like`
    8b          32 layers of 4,096, grouped-query attention: Llama 3's 8 B
    qwen3.5-27b the hybrid of linear and full attention, its text model
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from apollo.weights.model_directory import SIDE_FILES
from experiments import frame

SEED: Final = 0
SHARD: Final = "4GB"


def smollm2(like: Path) -> Any:
    return transformers.AutoConfig.from_pretrained(like)


def llama_8b(like: Path) -> Any:
    """The words are those of `like`; the matrices of 8 B parameters are not."""
    return transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        **special_tokens(like),
    )


def qwen3_5_27b(like: Path) -> Any:
    """The configuration of Qwen3.5-27B's text model."""
    return transformers.Qwen3_5TextConfig(
        hidden_size=5120,
        intermediate_size=17408,
        num_hidden_layers=64,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 16,
        num_attention_heads=24,
        num_key_value_heads=4,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=48,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        vocab_size=248320,
        max_position_embeddings=262144,
        tie_word_embeddings=False,
        architectures=["Qwen3_5ForCausalLM"],
        **special_tokens(like),
    )


SHAPES: Final[dict[str, Callable[[Path], Any]]] = {
    "smollm2": smollm2,
    "8b": llama_8b,
    "qwen3.5-27b": qwen3_5_27b,
}


def special_tokens(like: Path) -> dict[str, Any]:
    known = transformers.AutoConfig.from_pretrained(like)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(known, name, None) for name in names}


def make(shape: str, directory: Path, like: Path, device: str) -> int:
    """Write the model; returns the bytes of its weights. Raises FileExistsError for a directory."""
    directory.mkdir(parents=True)
    config = SHAPES[shape](like)
    torch.manual_seed(SEED)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory, max_shard_size=SHARD)
    for pattern in SIDE_FILES:
        for path in like.glob(pattern):
            is_its_own = (directory / path.name).exists() or path.name.endswith(".index.json")
            if not is_its_own and path.name != "reverie.json":
                shutil.copy(path, directory / path.name)
    return sum(each.numel() * each.element_size() for each in model.parameters())


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path, help="to be made")
    parser.add_argument("--like", type=Path, required=True, help="whose words are used")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = frame.begin(parser)
    size_bytes = make(options.shape, options.directory, options.like, options.device)
    frame.say(f"{options.shape}: {size_bytes / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
