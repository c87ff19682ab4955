"""Memories from files: a folder of Markdown, or JSONL. All of them are right, or none is taken.

    notes/*.md      a file is a memory; one with several '# ' headings, a memory for each of them
    memories.jsonl  a line is an object as in `POST /memories`

Read on the side of the command line: a server opens no paths that a client names. Links are
refused, hidden files and folders left out, and what is wrong is named with file and line.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from actors.errors import SettingsError
from actors.posted import MemoryRequest

MAX_FILES: Final = 10_000
MAX_FILE_BYTES: Final = 16 * 2**20
MAX_IMPORTED: Final = 100_000
"""As many as a cell keeps at all."""
_MARKDOWN: Final = (".md", ".markdown")
_FENCE: Final = re.compile(r" {0,3}(```|~~~)")
_KNOWN: Final = ("id", "tags", "created", "date")
"""Keys of a front matter that are ours; others are those of other programs."""


def read(path: Path) -> list[MemoryRequest]:
    """The memories of a folder, a Markdown file or a JSONL file; raises SettingsError."""
    if path.is_symlink() or not path.exists():
        raise SettingsError(f"{path} {_why_not(path)}; name a folder, or a .md or .jsonl file")
    if path.is_dir():
        files = _markdown_of(path)
        found = [memory for file in files for memory in _of_markdown(file, _name(file, path))]
    elif path.suffix == ".jsonl":
        found = list(_of_jsonl(path))
    elif path.suffix in _MARKDOWN:
        found = list(_of_markdown(path, path.name))
    else:
        raise SettingsError(f"{path} is not a folder, nor a .md or .jsonl file")
    if not 0 < len(found) <= MAX_IMPORTED:
        raise SettingsError(f"{path} holds {len(found)} memories; 1 to {MAX_IMPORTED} can be taken")
    return found


def _why_not(path: Path) -> str:
    return "is a link, which is not followed" if path.is_symlink() else "does not exist"


def _markdown_of(folder: Path) -> list[Path]:
    """By name, subfolders included."""
    found = []
    for place, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in [*folders, *sorted(names)]:
            path = Path(place, name)
            is_meant = path.suffix in _MARKDOWN or name in folders
            if name.startswith(".") or not is_meant:
                continue
            if path.is_symlink():
                raise SettingsError(f"{path} {_why_not(path)}; copy what it leads to, or remove it")
            if name not in folders:
                found.append(path)
    if len(found) > MAX_FILES:
        raise SettingsError(f"{folder} holds {len(found)} Markdown files, at most {MAX_FILES}")
    return found


def _refuse(error: OSError) -> None:
    raise SettingsError(f"{error.filename} cannot be read: {error.strerror}") from None


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _text_of(path: Path) -> str:
    try:
        # Whatever it has become since it was looked at, a link is not followed.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise SettingsError(f"{path} is over {MAX_FILE_BYTES} bytes; split it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise SettingsError(f"{path}:{line}: is not UTF-8; save it as such") from None


# Markdown.


def _of_markdown(path: Path, name: str) -> Iterator[MemoryRequest]:
    lines = _text_of(path).splitlines()
    matter, begin = _front_matter(path, lines)
    sections = _sections(lines, begin)
    for at, (first, text) in enumerate(sections):
        given = {**matter, "text": text}
        if "id" in matter and len(sections) > 1:
            given["id"] = f"{matter['id']}-{at + 1}"
        yield _memory(f"{path}:{first + 1}", name, given)


def _sections(lines: list[str], begin: int) -> list[tuple[int, str]]:
    """Where each begins, and its text, the heading its first line; blank ones are left out."""
    starts, is_code = [begin], False
    for at in range(begin, len(lines)):
        if _FENCE.match(lines[at]):
            is_code = not is_code
        if not is_code and lines[at].startswith("# "):
            starts.append(at)
    if len(starts) <= 2:  # At most one heading: it is the title of the whole.
        starts = [begin]
    ends = [*starts[1:], len(lines)]
    texts = [(first, _plain(lines[first:end])) for first, end in zip(starts, ends, strict=True)]
    return [(first, text) for first, text in texts if text]


def _plain(lines: list[str]) -> str:
    """Without the mark of the heading."""
    text = "\n".join(lines).strip()
    return text.removeprefix("# ").strip()


def _front_matter(path: Path, lines: list[str]) -> tuple[dict[str, Any], int]:
    """What stands between two lines of `---` at the top, and where the text begins."""
    if not lines or lines[0].rstrip() != "---":
        return {}, 0
    end = next((at for at, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    if end is None:
        raise SettingsError(f"{path}:1: the front matter has no end; close it with ---")
    found: dict[str, Any] = {}
    key = ""
    for at, line in enumerate(lines[1:end], 2):
        item = re.fullmatch(r"\s*-\s+(.*)", line)
        pair = re.fullmatch(r"(\w[\w -]*):\s*(.*)", line)
        if item and key == "tags":
            found["tags"] = [*(found["tags"] or []), _unquoted(item[1])]
        elif pair:
            key = pair[1]
            if key in found:
                raise SettingsError(f"{path}:{at}: {key} is given twice; give it once")
            if key in _KNOWN:
                found[key] = _value(f"{path}:{at}", key, pair[2].strip())
    if "date" in found:
        found.setdefault("created", found["date"])
        del found["date"]
    return found, end + 1


def _value(where: str, key: str, text: str) -> Any:
    if key == "tags":
        inner = text.removeprefix("[").removesuffix("]")
        return [_unquoted(each) for each in inner.split(",") if each.strip()]
    return _unquoted(text) if key == "id" else _time(where, _unquoted(text))


def _unquoted(text: str) -> str:
    text = text.strip()
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if is_quoted else text


def _time(where: str, text: str) -> float:
    """Without a zone it is UTC."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise SettingsError(f"{where}: {text!r} is no date; write it as 2026-11-24") from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


# JSONL.


def _of_jsonl(path: Path) -> Iterator[MemoryRequest]:
    for at, line in enumerate(_text_of(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SettingsError(f"{path}:{at}: is not JSON: {error}") from None
        if not isinstance(given, dict):
            raise SettingsError(f"{path}:{at}: is not a JSON object")
        if isinstance(given.get("created"), str):
            given["created"] = _time(f"{path}:{at}", given["created"])
        yield _memory(f"{path}:{at}", path.name, given)


def _memory(where: str, name: str, given: dict[str, Any]) -> MemoryRequest:
    """With an id of its own if it has none: the same text of the same file is taken once."""
    digest = hashlib.sha256(f"{name}\n{given.get('text')}".encode()).hexdigest()
    try:
        return MemoryRequest.model_validate({"id": f"file-{digest[:24]}", **given}, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "it"
        raise SettingsError(f"{where}: {key}: {first['msg']}; nothing was taken") from None
