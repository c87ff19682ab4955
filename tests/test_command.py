"""The `reverie` command without a cell: what it imports, refuses, and how it ends."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

from actors.errors import SettingsError
from command import experiments, record, run_folder, samples
from command.app import cli, main
from command.client import Refused, Server, Unreachable, key
from command.flow import Flow, printable
from command.jobs import curve
from command.record import CellRecord
from command.run_folder import Run
from command.run_report import numbers, page
from command.runs import state_of
from command.version_matrix import MATRIX
from tests.conftest import free_port
from tests.terminal import at_terminal

HEAVY = (
    "pydantic",
    "httpx",
    "torch",
    "ray",
    "vllm",
    "transformers",
    "openai",
    "starlette",
    "fastapi",
)


def reverie(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "command", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def every_command() -> list[tuple[str, ...]]:
    """Each command line that does something, as the program itself knows them."""
    import typer

    found: list[tuple[str, ...]] = []

    def walk(group: Any, path: tuple[str, ...]) -> None:
        for name, each in group.commands.items():
            if hasattr(each, "commands"):
                walk(each, (*path, name))
            else:
                found.append((*path, name))

    walk(typer.main.get_command(cli), ())
    return found


@contextmanager
def answering(status: int, body: bytes) -> Iterator[int]:
    """A server that gives everybody the same answer; yields its port."""

    class Same(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Same) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join(10)


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['reverie', '--help']\n"
        "from command.app import cli\n"
        "try: cli()\n"
        "except SystemExit: pass\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "LOADED []" in done.stdout, done.stdout + done.stderr
    assert "checkpoints" in done.stdout


def test_every_command_takes_json_and_says_what_it_does() -> None:
    commands = every_command()
    assert {("chat",), ("jobs", "cancel"), ("candidates", "approve"), ("runs",)} <= {
        *commands,
        ("runs",),
    }
    for path in commands:
        told = CliRunner().invoke(cli, [*path, "--help"], env={"COLUMNS": "200"})
        assert told.exit_code == 0 and "--json" in told.output, path


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["status"], 3, "reverie up"),
        (["jobs"], 3, "REVERIE_PORT"),
        (["chat", "hello"], 3, "no server answers"),
        (["down", "--yes"], 3, "no server answers"),
        (["submit", "hogwild"], 3, "--address"),
        (["submit", "hogwidl"], 1, "did you mean hogwild?"),
        (["submit", "hogwild", "--set", "lrr=1"], 1, "lrr=1: hogwild takes"),
        (["submit", "hogwild", "--set", "lr"], 1, "key=value"),
        (["submit", "hogwild", "--set", "lr=1", "--set", "lr=2"], 1, "given twice"),
        (["runs", "show", "none-1"], 1, "none-1: there is no such run"),
        (["candidates", "list", "--state", "new"], 1, "--state 'new'"),
        (["logs", "engine", "--follow", "--json"], 1, "leave one out"),
        (["jobs", "follow"], 2, "Missing argument"),
        (["status", "--prot", "1"], 2, "--prot"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_each_end_has_its_code_and_one_line(
    tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    port = str(free_port())
    done = reverie(*arguments, REVERIE_HOME=str(tmp_path), REVERIE_PORT=port, COLUMNS="200")
    assert done.returncode == code, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    if code != 2:
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_an_error_is_a_document_too(tmp_path: Path) -> None:
    port = str(free_port())
    done = reverie("jobs", "--json", REVERIE_HOME=str(tmp_path), REVERIE_PORT=port)
    told = json.loads(done.stdout)["error"]
    assert done.returncode == 3
    assert (told["type"], told["param"]) == ("unreachable_error", "port")
    assert f"port={port}" in told["message"]


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (200, b"<html>hello</html>", Unreachable, "no Reverie server"),
        (404, b'{"detail": "Not Found"}', Unreachable, "no Reverie server"),
        (503, b'{"error": {"message": "it starts"}}', Unreachable, "it starts"),
        (401, b'{"error": {"message": "no"}}', Refused, "REVERIE_KEY"),
        (422, b'{"error": {"message": "bad", "param": "n"}}', Refused, "bad"),
    ],
)
def test_a_server_s_no_is_told_from_no_server(
    status: int, body: bytes, kind: type[Exception], words: str
) -> None:
    with answering(status, body) as port, pytest.raises(kind, match=words):
        Server(port).get("/status")


def test_the_key_comes_from_the_environment_or_a_file_that_only_its_owner_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("REVERIE_KEY", "REVERIE_API_KEY", "REVERIE_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert key() is None
    path = tmp_path / "key"
    monkeypatch.setenv("REVERIE_KEY_FILE", str(path))
    with pytest.raises(SettingsError, match="No such file"):
        key()
    path.write_text("rv-abc\n")
    path.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        key()
    path.chmod(0o600)
    assert key() == "rv-abc"
    path.write_text("two words")
    with pytest.raises(SettingsError, match="2 words"):
        key()
    monkeypatch.setenv("REVERIE_KEY", "rv-first")
    assert key() == "rv-first"


GOOD = b'{"context": "a", "continuation": "b"}'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"context": "a"}', "f:2: continuation: is required"),
        (
            b'{"context": "a", "continuation": 3}',
            "f:2: continuation: must be a valid string, got 3",
        ),
        (b'{"context": "a", "continuation": "b", "wieght": 2}', "f:2: wieght: unknown key"),
        (b'{"context": "a", "continuation": "b", "weight": -1}', "f:2: weight: .*got -1"),
        (b'{"messages": []}', "f:2: messages: must have at least 1 item"),
        (
            b'{"messages": [{"role": "robot", "content": "x"}]}',
            'f:2: messages.0..role: must be .*got "robot"',
        ),
        (b'{"messages": [{"role": "user"}]}', "f:2: messages.0..content: is required"),
        (b'{"context": "a", "continuation": "b"', "f:2: the line is not valid JSON"),
        (b"[1, 2]", "f:2: the line must be a JSON object, not an array"),
        (b'{"context": "a", "context": "b"}', "f:2: .*given twice"),
        (b'{"context": NaN}', "f:2: .*NaN is not a number"),
        (b'{"context": "\xff"}', "f:2: the line is not UTF-8"),
        (b'{"conversation": 3}', "f:2: conversation: must be a list"),
        (b'{"conversation": []}', "f:2: conversation: no message in it is the assistant's"),
        (
            b'{"conversation": [{"role": "assistant", "content": 3}]}',
            "f:2: conversation.0..content: must be a valid string, got 3",
        ),
        (
            b'{"conversation": [{"role": "assistant", "content": "x"}, {"role": "user"}]}',
            "f:2: conversation.1..content: is required",
        ),
        (
            b'{"conversation": [{"role": "assistant", "content": "x"}], "labels": 1}',
            "f:2: labels: unknown key beside conversation",
        ),
        (
            b'{"conversation": [{"role": "assistant", "content": "x"}], "strip": ["robot"]}',
            "f:2: strip.0.: must be",
        ),
    ],
)
def test_a_wrong_line_is_named_with_its_key_and_value(line: bytes, words: str) -> None:
    with pytest.raises(SettingsError, match=f"^{words}"):
        samples.read(Path("f"), GOOD + b"\n" + line + b"\n" + GOOD)


def test_one_id_on_two_lines_is_refused_and_names_both() -> None:
    one = b'{"context": "a", "continuation": "b", "id": "x"}'
    with pytest.raises(SettingsError, match="^f:3: id: 'x' is that of line 1"):
        samples.read(Path("f"), one + b"\n\n" + one)
    with pytest.raises(SettingsError, match="holds no samples"):
        samples.read(Path("f"), b"\n \n")


def test_each_answer_of_a_conversation_is_a_sample_after_what_came_before_it() -> None:
    turns = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "5"},
    ]
    line = json.dumps({"conversation": turns, "id": "c", "source": "s", "weight": 2.0})
    found = samples.read(Path("f"), GOOD + b"\n" + line.encode())
    assert [each.number for each in found] == [1, 2, 2]
    first, second = (each.sample for each in found[1:])
    assert first == {"messages": turns[:2], "id": "c-1", "source": "s", "weight": 2.0}
    assert second == {"messages": turns[:4], "id": "c-2", "source": "s", "weight": 2.0}


def test_parts_hold_everything_once_and_no_more_than_a_request_may() -> None:
    lines = [samples.Line(number, {}, 10) for number in range(25)]
    made = list(samples.parts(lines, 4, 35))
    assert [line for part in made for line in part] == lines
    assert {len(part) for part in made} == {3, 1}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "epocs=2"], "epocs: unknown key.*a job's settings are learning_rate, epochs"),
        (["--epochs", "0"], "epochs: .*got 0"),
        (["--epochs", "2", "--set", "epochs=3"], "say it once"),
        (["--set", "objective=rlhf"], "objective"),
    ],
)
def test_a_job_s_setting_is_refused_before_anything_is_posted(
    tmp_path: Path, options: list[str], words: str
) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(GOOD)
    done = reverie("train", str(path), *options)
    assert done.returncode == 1 and re.search(words, done.stderr), done.stderr


def test_train_check_needs_no_server_and_reads_a_pipe(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "command", "train", "-", "--check", "--json"],
        input=GOOD + b"\n" + GOOD,
        capture_output=True,
        timeout=60,
    )
    assert json.loads(done.stdout) == {"samples": 2}, done.stderr


def test_a_record_says_whether_its_cell_lives(tmp_path: Path) -> None:
    mine = record.mine(8000, "127.0.0.1", "m", {"dashboard": "http://127.0.0.1:1"})
    record.write(tmp_path, mine)
    found = record.read(tmp_path, 8000)
    assert found == mine and found.process() is not None
    assert record.ports(tmp_path) == [8000] and record.read(tmp_path, 8001) is None
    # Another process under the same number is not it.
    assert CellRecord(8000, "127.0.0.1", "m", mine.pid, mine.begun - 100).process() is None
    record.end(tmp_path, mine, "generation 1 at version 2")
    ended = record.read(tmp_path, 8000)
    assert ended is not None and ended.saved == "generation 1 at version 2"
    (tmp_path / "run" / "8000.json").write_text("{")
    assert record.read(tmp_path, 8000) is None


def test_an_experiment_s_options_are_those_that_it_says_itself() -> None:
    assert {"hogwild", "ingress_overhead", "kill_nine"} <= set(experiments.names())
    assert not {"cells", "hogwild_report"} & set(experiments.names())
    found = experiments.find("ingress_overhead")
    assert set(found.options) == {"base", "rounds", "tokens", "json"}
    filled = found.defaults(Path("/h"), "http://127.0.0.1:9")
    assert filled == {"base": "http://127.0.0.1:9", "json": "ingress_overhead.json"}
    assert found.arguments({"rounds": "1"}) == ["--rounds=1"]


@pytest.mark.parametrize("name", experiments.names())
def test_every_experiment_can_be_submitted_as_it_says(name: str) -> None:
    found = experiments.find(name)
    assert found.about.endswith("."), found.about
    assert found.arguments(found.defaults(Path("/h"), "http://127.0.0.1:9")) is not None


def test_the_version_matrix_is_that_of_the_lock_and_of_pyproject() -> None:
    import tomllib

    root = Path(__file__).parents[1]
    lines = (root / "requirements-cpu.lock").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if "==" in line)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["cuda"]
    for each in MATRIX:
        (pinned,) = [locked[name] for name in each.distributions if name in locked]
        assert pinned.partition("+")[0] == each.version
        (needed,) = [item for item in wanted if re.match(rf"{each.name}\b(?!-)", item)]
        assert needed.endswith(f">={each.oldest}"), needed


def test_nothing_that_a_model_writes_commands_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\r\nc\td\u202e\u200c") == "a[2Jb\nc\td\u200c"


def test_what_cannot_be_undone_is_asked_about_at_a_terminal(tmp_path: Path) -> None:
    given = os.environ | {"REVERIE_HOME": str(tmp_path), "REVERIE_PORT": str(free_port())}
    for command in (["forget", "sample-1"], ["rollback", "3"]):
        with at_terminal([sys.executable, "-m", "command", *command], given) as terminal:
            terminal.until(r"(Forget sample-1|Undo everything).*\[y/N\]", 60)
            terminal.press("n\n")
            assert terminal.wait() == 1 and "no server" not in terminal.shown()
        sure = reverie(*command, "--yes", **{k: given[k] for k in ("REVERIE_HOME", "REVERIE_PORT")})
        assert sure.returncode == 3


def test_an_answer_is_broken_between_words_under_its_first_column() -> None:
    console = Console(width=30, file=StringIO())
    flow = Flow(console, 5, 30)
    for piece in ("One two thr", "ee four fi", "ve six\nsev", "en"):
        flow.add(piece)
    flow.end("(cut off)")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown == "One two three four five\n     six\n     seven  (cut off)\n"


def test_the_curve_falls_with_the_loss() -> None:
    assert curve([3.0, 2.0, 1.0], 60) == "#= "
    assert len(curve([1.0] * 1000, 60)) <= 60 and curve([], 60) == ""


def test_main_ends_with_the_code_of_the_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["reverie", "runs", "show", "x", "--json"])
    monkeypatch.setenv("REVERIE_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert json.loads(capsys.readouterr().out)["error"]["param"] == "run"


def test_runs_are_compared_on_one_page_that_runs_nothing(tmp_path: Path) -> None:
    made = []
    for rate, loss in (("1", 2.0), ("<script>", 1.0)):
        name, place = run_folder.create(tmp_path, "hogwild")
        settings = {"lr": rate}
        one = Run(name, "hogwild", settings, "x", "http://127.0.0.1:1", 0.0, {"ray": "2.60.0"})
        one.save(tmp_path)
        rows = [{"mode": "free", "loss": loss, "losses": [9.0, loss]}]
        (place / "hogwild.json").write_text(json.dumps(rows))
        (place / "hogwild.png").write_bytes(b"not really")
        (place / "exit_code").write_text("0\n")
        made.append(one)
    assert [each.id for each in run_folder.every(tmp_path)] and len({m.id for m in made}) == 2
    shown = page([(each, "done") for each in made], tmp_path)
    assert "&lt;script&gt;" in shown and "<script" not in shown and "http://" not in shown
    assert "hogwild.json mode free loss" in shown and "0.50x" in shown
    assert shown.count("data:image/png") == 2
    assert made[0].results(tmp_path) == {"hogwild.json": 53, "hogwild.png": 10}
    assert made[0].ended(tmp_path)[0] == "done"  # type: ignore[index]


def test_what_a_summary_says_of_its_settings_and_machine_is_no_result(tmp_path: Path) -> None:
    name, place = run_folder.create(tmp_path, "soak")
    one = Run(name, "soak", {}, "x", "http://127.0.0.1:1", 0.0)
    summary = {"settings": {"rounds": 3}, "machine": {"cores": 2}, "seconds": 7.5, "lost": 0}
    (place / "soak.json").write_text(json.dumps(summary))
    assert numbers(one, tmp_path) == {"soak.json seconds": 7.5, "soak.json lost": 0}


def test_a_run_whose_ray_is_gone_is_lost_unless_it_could_say_how_it_ended(tmp_path: Path) -> None:
    name, place = run_folder.create(tmp_path, "hogwild")
    one = Run(name, "hogwild", {}, "x", f"http://127.0.0.1:{free_port()}", 0.0)
    one.save(tmp_path)
    assert state_of(one, tmp_path) == "lost"
    assert state_of(one.stopped(), tmp_path) == "stopped"
    (place / "exit_code").write_text("2\n")
    assert state_of(one, tmp_path) == "failed"


def test_down_does_not_wait_for_a_process_that_nobody_reaps(tmp_path: Path) -> None:
    port = free_port()
    ends_in_order = "import signal, time; signal.signal(15, lambda *_: exit()); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", ends_in_order])
    try:
        begun = psutil.Process(child.pid).create_time()
        one = CellRecord(port, "127.0.0.1", "m", child.pid, begun, saved="generation 1")
        record.write(tmp_path, one)
        given = {"REVERIE_HOME": str(tmp_path), "REVERIE_PORT": str(port)}
        done = reverie("down", "--yes", "--json", **given)
        assert json.loads(done.stdout) == {"port": port, "saved": "generation 1"}, done.stderr
        assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
    finally:
        child.kill()
        child.wait(30)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nobody", "--ongoing", "1"], "nobody: there is no key of this id"),
        (["nobody"], "nothing to change"),
        (
            ["nobody", "--unlimited", "tokens"],
            "unlimited=tokens: choose one of requests_per",
        ),
        (["nobody", "--ongoing", "1", "--unlimited", "ongoing"], "without a number"),
    ],
)
def test_a_change_of_quotas_that_says_nothing_is_refused(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    done = reverie("keys", "limit", *arguments, REVERIE_HOME=str(tmp_path))
    assert done.returncode == 1 and words in done.stderr, done.stderr
    assert not (tmp_path / "keys.json").exists()
