"""A program at a real terminal: what it shows there, and what it does when keys are pressed."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

EXIT_TIMEOUT_S = 30
CTRL_C, CTRL_D = "\x03", "\x04"
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x1b[=>]|\r")


class Terminal:
    """One program, 100 columns wide."""

    def __init__(self, process: "subprocess.Popen[bytes]", descriptor: int) -> None:
        self.process = process
        self.raw = ""
        """All that it has sent, with its control sequences."""
        self._descriptor = descriptor
        self._seen = 0

    def press(self, keys: str) -> None:
        os.write(self._descriptor, keys.encode())

    def until(self, pattern: str, timeout_s: float) -> "re.Match[str]":
        """Wait for text that was not waited for before; fails with what there is instead."""
        deadline = time.monotonic() + timeout_s
        while True:
            shown = self.shown()
            if found := re.search(pattern, shown[self._seen :]):
                self._seen += found.end()
                return found
            assert time.monotonic() < deadline, f"no {pattern!r} in:\n{shown}"
            if not self._read(0.2) and self.process.poll() is not None:
                raise AssertionError(f"it ended without {pattern!r}:\n{shown}")

    def shown(self) -> str:
        """The text, without control sequences."""
        return CONTROL.sub("", self.raw)

    def wait(self) -> int:
        """Read to the end; its exit code."""
        deadline = time.monotonic() + EXIT_TIMEOUT_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it does not end:\n{self.shown()}"
            self._read(0.2)
        while self._read(0.1):
            pass
        return self.process.returncode

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self._descriptor], [], [], timeout_s)[0]:
            return False
        try:
            piece = os.read(self._descriptor, 65536)
        except OSError:  # The other side is closed.
            return False
        self.raw += piece.decode(errors="replace")
        return bool(piece)


def _at_a_terminal_of_its_own() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Whoever tests in the background ignores it.


@contextmanager
def at_terminal(command: list[str], environment: Mapping[str, str]) -> Iterator[Terminal]:
    """Run `command` with a terminal of its own as its three files; it is ended afterwards."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=dict(environment) | {"TERM": "xterm-256color"},
        start_new_session=True,
        preexec_fn=_at_a_terminal_of_its_own,
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(EXIT_TIMEOUT_S)
        os.close(ours)
