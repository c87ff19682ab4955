"""What experiments share: they go on where they were cut, and say what their results depend on."""

import argparse
import ast
import json
from pathlib import Path

import pytest

from apollo.weights import manifest
from command import experiments
from experiments import frame
from experiments.cells import require_untaught

SCRIPTS = [Path(frame.__file__).with_name(f"{name}.py") for name in experiments.names()]


def test_what_a_kill_left_half_written_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    assert frame.Finished(path).rows == []
    frame.Finished(path).add({"run": 1})
    with path.open("a") as file:
        file.write('{"run": 2, "lo')
    again = frame.Finished(path)
    assert again.rows == [{"run": 1}]
    again.add({"run": 2})
    assert frame.Finished(path).rows == again.rows == [{"run": 1}, {"run": 2}]


def test_a_summary_says_what_it_depends_on(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    options = argparse.Namespace(rounds=3, on=["ext4"], json=Path("found.json"), key="rv-1")
    frame.keep(None, options, {"lost": 0})
    frame.keep(path, options, {"lost": 0})
    (made,) = tmp_path.iterdir()
    found = json.loads(made.read_text())
    assert found["lost"] == 0 and found["seconds"] >= 0
    assert found["settings"] == {"rounds": 3, "on": ["ext4"], "json": "found.json"}
    assert "rv-1" not in made.read_text()
    assert {"torch", "vllm", "python", "commit"} <= set(found["versions"])
    assert found["machine"]["cores"] >= 1


def test_every_experiment_uses_the_frame_and_the_same_words_for_the_same_things() -> None:
    helps: dict[str, set[str]] = {}
    for path in SCRIPTS:
        text = path.read_text()
        assert "frame.parser(__doc__)" in text and "frame.begin(" in text, path.name
        about = ast.get_docstring(ast.parse(text)) or ""
        assert f"-m experiments.{path.stem}" in about, path.name
        for option in experiments.find(path.stem).options.values():
            helps.setdefault(option.name, set()).add(option.help)
    for name in ("out", "json", "plot", "threads", "model", "seed"):
        assert len(helps[name]) == 1 and helps[name] != {""}, (name, helps[name])


def test_a_picture_needs_no_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    made = frame.figure(3, 2)
    made.subplots().plot([1, 2, 3])
    frame.draw_to(tmp_path / "some.png", made)
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_a_cell_has_taught_is_no_base(tmp_path: Path) -> None:
    for generation in (0, 3):
        made = manifest.Manifest("tiny", "float32", {}, generation=generation)
        manifest.write(tmp_path, made)
        if generation:
            with pytest.raises(SystemExit, match="generation 3 of what a cell has taught it"):
                require_untaught(str(tmp_path))
        else:
            require_untaught(str(tmp_path))
    require_untaught("smollm2-135m")
