"""What `reverie up` refuses before it starts anything, and where its demo's picture comes from."""

import socket
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from actors.errors import SettingsError
from actors.settings import Settings
from command.picture import Recording, draw
from command.up import check_address
from door.keys import KeyStore


def test_a_public_address_needs_keys(tmp_path: Path) -> None:
    settings = Settings(host="0.0.0.0", home=tmp_path, port=47_123)
    with pytest.raises(SettingsError, match="reverie keys add"):
        check_address(settings)
    KeyStore(tmp_path).add("teach")
    check_address(settings)


def test_a_taken_port_is_named_with_its_remedy(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"port={port}.*PORT="):
            check_address(Settings(home=tmp_path, port=port))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "trainer.rnak=3"], "unknown setting trainer.rnak"),
        (["--set", "trainer.rank"], "group.key=value"),
        (["--host", "example.com"], "not an IP address"),
        (["--port", "99999"], "port=99999"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_status_1(arguments: list[str], words: str) -> None:
    command = [sys.executable, "-m", "command", "up", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_the_picture_is_an_svg_with_both_answers_and_every_step() -> None:
    seen = Recording("Who?", "A <b>.", "C & D.", [0, 0.1, 0.3], [1, 2], [3.0, 0.1], (0.5, 2.0))
    root = ElementTree.fromstring(draw(seen))
    texts = ["".join(part.itertext()) for part in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Who?", "A <b>.", "C & D."} <= set(texts)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 2
