"""Memories from files: what becomes one, and what is refused with its file and line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actors.dream import memory
from actors.errors import SettingsError
from command import dreams
from command.app import cli
from command.client import Server


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def texts(path: Path) -> list[str]:
    return [each.text for each in memory.read(path)]


def test_a_file_is_a_memory_and_several_top_level_sections_are_several(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "b.md": "# Garden\n\nI grow tomatoes.\n\n## When\nIn May.\n",
            "a/two.markdown": "Before.\n\n# One\nText one.\n# Two\n```\n# no heading\n```\n",
            "empty.md": "\n\n",
            "other.txt": "not meant",
            ".hidden/no.md": "not meant",
            ".hidden.md": "not meant",
        },
    )
    assert texts(tmp_path) == [
        "Garden\n\nI grow tomatoes.\n\n## When\nIn May.",
        "Before.",
        "One\nText one.",
        "Two\n```\n# no heading\n```",
    ]


def test_a_front_matter_gives_tags_time_and_id_and_other_programs_keys_are_left(
    tmp_path: Path,
) -> None:
    write(
        tmp_path,
        {
            "a.md": "---\ntags: [garden, 'sun set']\ndate: 2026-05-01\nid: mine\n"
            "aliases:\n  - x\nnested:\n  deep: 1\n---\nI grow tomatoes.\n",
            "b.md": "---\ntags:\n  - 'garden'\n  - work\ncreated: 2026-05-01T02:00:00+02:00\n"
            "id: two\n---\n# A\n1\n# B\n2\n",
        },
    )
    one, two, three = memory.read(tmp_path)
    assert (one.id, one.tags, one.text) == ("mine", ["garden", "sun set"], "I grow tomatoes.")
    assert one.created == two.created == 1777593600.0
    assert (two.id, three.id, three.tags) == ("two-1", "two-2", ["garden", "work"])


def test_the_same_text_of_the_same_file_has_the_same_id_wherever_the_folder_lies(
    tmp_path: Path,
) -> None:
    files = {"a.md": "# A\n1\n# B\n2", "b.md": "1"}
    first, second = write(tmp_path / "x", files), write(tmp_path / "y", files)
    assert memory.read(first) == memory.read(second)
    assert len({each.id for each in memory.read(first)}) == 3
    write(second, {"a.md": "# A\n1\n# B\nchanged"})
    same = {each.id for each in memory.read(first)} & {each.id for each in memory.read(second)}
    assert len(same) == 2


def test_jsonl_holds_what_a_client_posts(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(
        '{"text": "one", "tags": ["a"], "id": "i"}\n\n{"text": "two", "created": "2026-05-01"}\n'
    )
    one, two = memory.read(path)
    assert (one.text, one.tags, one.id) == ("one", ["a"], "i")
    assert (two.text, two.created) == ("two", 1777593600.0)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("m.jsonl", '{"text": "a"}\n{"text": ', "m.jsonl:2: is not JSON"),
        ("m.jsonl", '{"text": "a"}\n[1]\n', "m.jsonl:2: is not a JSON object"),
        ("m.jsonl", '{"text": "a"}\n\n{"txt": "b"}', "m.jsonl:3: text: Field required"),
        ("m.jsonl", '{"text": "a", "tag": []}', "m.jsonl:1: tag: Extra inputs"),
        ("m.jsonl", '{"text": "a", "created": "May"}', "m.jsonl:1: 'May' is no date"),
        ("m.jsonl", '{"text": "a", "created": true}', "m.jsonl:1: created"),
        ("m.jsonl", "[" * 100_000, "m.jsonl:1: is not JSON"),
        ("m.jsonl", "\n", "holds 0 memories"),
        ("n.md", "# A\n1\n# B\n" + "x" * 4000, "n.md:3: text: String should have at most 4000"),
        ("n.md", "---\ntags: a\n", "n.md:1: the front matter has no end"),
        ("n.md", "---\nid: a\nid: b\n---\nx", "n.md:3: id is given twice"),
        ("n.md", "---\ndate: soon\n---\nx", "n.md:2: 'soon' is no date"),
        ("n.txt", "x", "is not a folder, nor"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(
    tmp_path: Path, name: str, text: str, says: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SettingsError, match=says.replace("[", r"\[")):
        memory.read(tmp_path / name)


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(SettingsError, match=r"a.md:2: is not UTF-8"):
        memory.read(tmp_path)


def test_links_are_refused_wherever_they_are(tmp_path: Path) -> None:
    write(tmp_path / "real", {"a.md": "x"})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(SettingsError, match="link is a link, which is not followed"):
        memory.read(tmp_path / "link")
    (tmp_path / "real" / "b.md").symlink_to("/etc/passwd")
    with pytest.raises(SettingsError, match=r"b.md is a link"):
        memory.read(tmp_path / "real")
    (tmp_path / "real" / "b.md").unlink()
    (tmp_path / "real" / "sub").symlink_to("/etc")
    with pytest.raises(SettingsError, match="sub is a link"):
        memory.read(tmp_path / "real")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.md")
    with pytest.raises(SettingsError, match="holds 0 memories"):
        memory.read(tmp_path)


@pytest.mark.parametrize("limit", ["MAX_FILES", "MAX_FILE_BYTES", "MAX_IMPORTED"])
def test_each_limit_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    write(tmp_path, {"a.md": "x", "b.md": "y"})
    monkeypatch.setattr(memory, limit, 1 if limit != "MAX_FILE_BYTES" else 0)
    with pytest.raises(SettingsError, match="at most 1|over 0 bytes|1 to 1 can be taken"):
        memory.read(tmp_path)


def test_the_command_posts_all_in_parts_that_fit_into_a_body(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    posted: list[Any] = []
    monkeypatch.setattr(Server, "post", lambda *asked: posted.append(asked))
    longest = [{"text": "\u1234" * 4000, "tags": ["t" * 64] * 32}] * (dreams.MEMORIES_AT_ONCE + 1)
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in longest))
    done = CliRunner().invoke(cli, ["memories", "--add", str(path)])
    assert done.exit_code == 0 and "201 memories" in done.output
    bodies = [body for _, _, body in posted]
    assert [len(body["memories"]) for body in bodies] == [dreams.MEMORIES_AT_ONCE, 1]
    assert max(len(json.dumps(body)) for body in bodies) < 8 * 2**20


def test_nothing_is_posted_if_one_line_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    posted: list[Any] = []
    monkeypatch.setattr(Server, "post", lambda *asked: posted.append(asked))
    path = tmp_path / "m.jsonl"
    path.write_text('{"text": "right"}\n{"text": 3}\n')
    done = CliRunner().invoke(cli, ["memories", "--add", str(path)])
    assert done.exit_code != 0 and posted == []
