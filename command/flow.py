"""Text that arrives in pieces, laid out as it comes: broken between words, under its first column.

Nothing that a model writes reaches the terminal as a control sequence.
"""

import unicodedata
from typing import Final

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

REORDERING: Final = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that show a line in another order than it is written in."""
MAX_WORD: Final = 200
"""A longer word is not waited for: it is shown, and the terminal breaks it."""


class Flow:
    """One answer on `console`, to be ended with `end`."""

    def __init__(self, console: Console, indent: int, width: int | None) -> None:
        self._console = console
        self._indent = indent
        self._width = width
        """Columns to break at; None breaks nowhere."""
        self._column = indent
        self._word = ""
        self._gap = ""

    def add(self, piece: str) -> None:
        """Show what is whole of the text so far; its last word may go on."""
        for char in printable(piece):
            if char == "\n":
                self._flush()
                self._write("\n" + " " * self._indent)
                self._column, self._gap = self._indent, ""
            elif char in " \t":
                self._flush()
                self._gap += " "
            else:
                self._word += char
                if self._width is None or len(self._word) > MAX_WORD:
                    self._flush()

    def end(self, note: str = "") -> None:
        """Show the rest, and a note beside it."""
        self._flush()
        if note:
            self._word, self._gap = note, "  "
            self._flush(style="dim")
        self._write("\n")

    def _flush(self, style: str = "") -> None:
        if not self._word:
            return
        size = cell_len(self._gap + self._word)
        is_full = self._width is not None and self._column + size > self._width
        if is_full and self._column > self._indent:
            self._write("\n" + " " * self._indent)
            self._column, self._gap = self._indent, ""
            size = cell_len(self._word)
        self._write(self._gap + self._word, style)
        self._column += size
        self._word = self._gap = ""

    def _write(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style), end="", soft_wrap=True)
        self._console.file.flush()


def printable(text: str) -> str:
    """Without characters that command a terminal; line ends and tabs stay."""
    return "".join(
        char
        for char in text.replace("\r\n", "\n")
        if char in "\n\t" or (unicodedata.category(char) != "Cc" and char not in REORDERING)
    )
