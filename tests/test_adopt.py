"""Adoption with real wheels, real directories, and stock readers of what comes out."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from apollo.weights import manifest
from apollo.weights.adopt import Adopted, AdoptionError, adopt, copy_file
from apollo.weights.convert import convert_file
from apollo.weights.manifest import ManifestError


def adopted(model: str | Path, home: Path, dtype: str | None = None) -> Adopted:
    return adopt(str(model), home, dtype, lambda line: None)


def digest(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of every file: equal only if nobody touched the directory."""
    return {
        path.name: (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(directory.iterdir())
        if path.is_file()
    }


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def tiny_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four shards in bfloat16, saved as transformers saves it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        dtype="bfloat16",
    )
    directory = tmp_path_factory.mktemp("originals") / "tiny"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory, max_shard_size="100KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    return directory


@pytest.fixture
def tiny(tiny_bf16: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that the test may break."""
    return Path(shutil.copytree(tiny_bf16, tmp_path / "tiny"))


# The default model.


def test_default_model_is_complete_and_float32(model_dir: Path, reverie_home: Path) -> None:
    found = adopted("smollm2-135m", reverie_home, "float32")
    assert found.directory == model_dir == reverie_home.resolve() / "models" / "smollm2-135m"
    tensors = load_file(model_dir / "model.safetensors")
    assert len(tensors) == found.num_tensors == 272
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert sum(tensor.nbytes for tensor in tensors.values()) == found.size_bytes
    record = manifest.read(model_dir)
    assert record is not None
    assert (record.base, record.dtype, record.generation) == ("smollm2-135m", "float32", 0)


def test_default_model_answers_through_stock_transformers(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(answer[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in text


def test_second_call_changes_nothing(model_dir: Path, reverie_home: Path) -> None:
    before = digest(model_dir)
    said: list[str] = []
    adopt("smollm2-135m", reverie_home, "float32", said.append)
    assert said == []
    assert digest(model_dir) == before


def test_adopted_model_is_found_without_torch(model_dir: Path, reverie_home: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from apollo.weights.adopt import adopt\n"
        f"adopt('smollm2-135m', Path({str(reverie_home)!r}), 'float32', print)\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# Directories.


def test_directory_is_copied_and_the_original_is_untouched(tiny: Path, tmp_path: Path) -> None:
    (tiny / "README.md").write_text("not needed")
    before = digest(tiny)
    found = adopted(tiny, tmp_path / "home")
    assert digest(tiny) == before
    copied = {path.name: path.read_bytes() for path in tiny.iterdir() if path.suffix != ".md"}
    ours = {path.name: path.read_bytes() for path in found.directory.iterdir()}
    del ours[manifest.FILE_NAME]
    index = "model.safetensors.index.json"
    assert json.loads(ours.pop(index))["weight_map"] == json.loads(copied.pop(index))["weight_map"]
    assert json.loads(ours.pop("config.json")) == json.loads(copied.pop("config.json"))
    assert ours == copied
    shard = next(iter(found.directory.glob("*.safetensors")))
    with shard.open("r+b") as file:
        file.write(b"\0" * 8)
    assert digest(tiny) == before


def test_links_into_a_hub_cache_become_files_of_our_own(tiny: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "snapshots" / "rev1"
    snapshot.mkdir(parents=True)
    for path in tiny.iterdir():
        os.symlink(path, snapshot / path.name)
    directory = adopted(snapshot, tmp_path / "home").directory
    assert directory.name == "rev1"
    assert not any(path.is_symlink() for path in directory.iterdir())
    assert not any(path.stat().st_nlink > 1 for path in directory.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_converted_tensor_by_tensor(dtype: str, tiny: Path, tmp_path: Path) -> None:
    source = tiny
    if dtype == "bfloat16":
        source = adopted(tiny, tmp_path / "first", "float32").directory
    found = adopted(source, tmp_path / "home", dtype)
    for path in source.glob("*.safetensors"):
        originals = load_file(path)
        tensors = load_file(found.directory / path.name)
        assert list(tensors) == list(originals)
        for name, tensor in tensors.items():
            assert tensor.dtype == getattr(torch, dtype)
            assert torch.equal(tensor, originals[name].to(tensor.dtype)), name
    config = json.loads((found.directory / "config.json").read_text())
    assert config["dtype"] == dtype
    index = json.loads((found.directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == found.size_bytes
    model = AutoModelForCausalLM.from_pretrained(found.directory)
    assert model.dtype == getattr(torch, dtype)


def test_conversion_keeps_buffers_scalars_metadata_and_alignment(tmp_path: Path) -> None:
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    tensors = {
        "mask": torch.tensor([True, False, True]),
        "positions": torch.arange(5, dtype=torch.int64),
        "scale": torch.tensor(0.1, dtype=torch.bfloat16),
        "nothing": torch.zeros(0, 4, dtype=torch.bfloat16),
        "weight": torch.randn(3, 5).to(torch.bfloat16),
        "wide": torch.randn(7, dtype=torch.float64),
    }
    save_file(tensors, source, metadata={"format": "pt"})
    convert_file(source, target, "float32")
    found = load_file(target)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        wanted = tensor.to(torch.float32) if tensor.is_floating_point() else tensor
        assert found[name].dtype == wanted.dtype
        assert torch.equal(found[name], wanted), name
    again = tmp_path / "again.safetensors"
    save_file(found, again, metadata={"format": "pt"})
    assert load_file(again).keys() == found.keys()
    assert again.stat().st_size == target.stat().st_size


def test_model_can_be_named_by_its_adopted_directory(tiny: Path, tmp_path: Path) -> None:
    found = adopted(tiny, tmp_path / "home")
    shutil.rmtree(tiny)
    assert adopted(found.directory, tmp_path / "home") == found
    assert adopted(tiny, tmp_path / "home") == found, "the original is not needed any more"


def test_hub_id_is_downloaded_and_copied(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = adopted("org/name-1.5", tmp_path / "home")
    assert found.name == "name-1.5"
    assert asked[0][0] == "org/name-1.5"
    assert "*.safetensors" in asked[0][1]
    assert not any(pattern.endswith((".bin", ".py")) for pattern in asked[0][1])
    assert adopted("org/name-1.5", tmp_path / "home") == found
    assert len(asked) == 1
    with pytest.raises(AdoptionError, match=r"already holds org/name-1\.5, not other/name-1\.5"):
        adopted("other/name-1.5", tmp_path / "home")


def test_hub_id_that_cannot_be_had_says_what_to_check(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from apollo.weights.adopt import adopt\n"
        f"adopt('org/name', Path({str(tmp_path)!r}), None, print)"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=offline, capture_output=True, text=True, timeout=60
    )
    last_line = ended.stderr.strip().splitlines()[-1]
    assert "AdoptionError: org/name could not be downloaded" in last_line
    assert "give a local directory" in last_line
    assert not (tmp_path / "models" / "name").exists()


# Interrupted and damaged.


def test_half_made_directory_is_remade(tiny: Path, tmp_path: Path) -> None:
    directory = adopted(tiny, tmp_path / "home").directory
    (directory / manifest.FILE_NAME).unlink()
    (directory / "config.json").write_text("torn")
    hidden = directory.with_name(f".{directory.name}.adopting")
    hidden.mkdir()
    (hidden / "config.json").write_text("torn too")
    assert adopted(tiny, tmp_path / "home").directory == directory
    assert json.loads((directory / "config.json").read_text())["model_type"] == "llama"
    assert not hidden.exists()


def test_truncated_untaught_model_is_remade(tiny: Path, tmp_path: Path) -> None:
    directory = adopted(tiny, tmp_path / "home").directory
    shard = next(iter(sorted(directory.glob("*.safetensors"))))
    os.truncate(shard, 100)
    adopted(tiny, tmp_path / "home")
    assert shard.read_bytes() == (tiny / shard.name).read_bytes()


def test_damaged_taught_model_is_never_overwritten(tiny: Path, tmp_path: Path) -> None:
    directory = adopted(tiny, tmp_path / "home").directory
    edit_json(directory / manifest.FILE_NAME, generation=3)
    os.truncate(directory / "config.json", 5)
    before = digest(directory)
    with pytest.raises(AdoptionError, match="not those of generation 3; restore it from a backup"):
        adopted(tiny, tmp_path / "home")
    assert digest(directory) == before


def test_failed_adoption_leaves_nothing_behind(tiny: Path, tmp_path: Path) -> None:
    os.truncate(sorted(tiny.glob("*.safetensors"))[-1], 100)
    with pytest.raises(AdoptionError, match="is damaged"):
        adopted(tiny, tmp_path / "home")
    assert [path.name for path in (tmp_path / "home" / "models").iterdir()] == [".tiny.lock"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is damaged"),
        ("[]", "has format"),
        ('{"format": 2}', "has format 2; this version of Reverie reads 1"),
        ('{"format": 1, "base": "x"}', "its keys are base"),
    ],
)
def test_strange_manifest_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / manifest.FILE_NAME).write_text(text)
    with pytest.raises(ManifestError, match=reason):
        manifest.read(tmp_path)


def test_unknown_manifest_format_is_not_overwritten(tiny: Path, tmp_path: Path) -> None:
    directory = adopted(tiny, tmp_path / "home").directory
    edit_json(directory / manifest.FILE_NAME, format=2)
    with pytest.raises(AdoptionError, match="has format 2.*remove it and start again"):
        adopted(tiny, tmp_path / "home")


# Refusals: each names what is wrong and what to do.


def use_bin(directory: Path) -> None:
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"x")


def remove_weights(directory: Path) -> None:
    for path in directory.glob("*.safetensors*"):
        path.unlink()


def quantise_nested(directory: Path) -> None:
    edit_json(
        directory / "config.json", text_config={"quantization_config": {"quant_method": "fp8"}}
    )


def pack_weights(directory: Path) -> None:
    path = sorted(directory.glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = min(tensors)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, path)


def drop_tensor(directory: Path) -> None:
    path = sorted(directory.glob("*.safetensors"))[0]
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: shutil.rmtree(path), "does not exist; give a directory or a hub id"),
        (lambda path: (path / "config.json").unlink(), "has no config.json; give a complete"),
        (lambda path: (path / "config.json").write_text("{"), "config.json is damaged"),
        (use_bin, r"weights as \.bin files.*safe_serialization=True"),
        (remove_weights, "has no safetensors file; give a complete"),
        (
            lambda path: edit_json(
                path / "config.json", quantization_config={"quant_method": "gptq"}
            ),
            r"is quantised \(gptq\).*take the unquantised model",
        ),
        (quantise_nested, r"is quantised \(fp8\)"),
        (pack_weights, r"has type F8_E4M3; quantised weights cannot be taught"),
        (drop_tensor, "is incomplete: no file holds"),
        (
            lambda path: sorted(path.glob("*.safetensors"))[0].unlink(),
            "is incomplete: .* names model-00001-of-.*; download the model again",
        ),
        (
            lambda path: (path / "model.safetensors.index.json").unlink(),
            "safetensors files and no model.safetensors.index.json",
        ),
    ],
)
def test_what_cannot_be_taught_is_refused(
    harm: Callable[[Path], object], reason: str, tiny: Path, tmp_path: Path
) -> None:
    harm(tiny)
    with pytest.raises(AdoptionError, match=reason):
        adopted(tiny, tmp_path / "home")
    assert not (tmp_path / "home" / "models" / "tiny").exists()


def test_file_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(AdoptionError, match="is a file; give the directory"):
        adopted(tiny / "config.json", tmp_path / "home")


@pytest.mark.parametrize("model", ["nonsense", "", "a/b/c"])
def test_unknown_name_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(AdoptionError, match="neither a directory, nor a hub id"):
        adopted(model, tmp_path / "home")


def test_unknown_dtype_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(AdoptionError, match="dtype='float16' is unknown; use float32 or bfloat16"):
        adopted(tiny, tmp_path / "home", "float16")


def test_other_dtype_of_an_adopted_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    adopted(tiny, tmp_path / "home")
    with pytest.raises(AdoptionError, match="holds bfloat16, not float32; set dtype=bfloat16"):
        adopted(tiny, tmp_path / "home", "float32")


def test_two_models_of_one_name_are_refused(tiny: Path, tmp_path: Path) -> None:
    adopted(tiny, tmp_path / "home")
    other = shutil.copytree(tiny, tmp_path / "elsewhere" / "tiny")
    with pytest.raises(AdoptionError, match="already holds .*copy the model to a directory of"):
        adopted(other, tmp_path / "home")


def test_missing_chat_template_is_only_noted(tiny: Path, tmp_path: Path) -> None:
    said: list[str] = []
    adopt(str(tiny), tmp_path / "home", None, said.append)
    assert any("no chat template" in line for line in said)


def test_copy_never_overwrites(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("1")
    other.write_text("2")
    with pytest.raises(FileExistsError):
        copy_file(one, other)
    assert other.read_text() == "2"


def test_every_directory_that_is_made_is_durable_in_the_one_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(manifest, "sync_directory", synced.append)
    manifest.make_directory(tmp_path / "home" / "state" / "name")
    assert set(synced) == {tmp_path, tmp_path / "home", tmp_path / "home" / "state"}
    synced.clear()
    manifest.make_directory(tmp_path / "home" / "state" / "name")
    assert set(synced) == {tmp_path / "home", tmp_path / "home" / "state"}
