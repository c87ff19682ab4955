"""Where a user's cells keep everything, and what they are called if nobody says otherwise.

Apart from the settings, so that a command can start without them.
"""

import os
from pathlib import Path
from typing import Final

DEFAULT_MODEL: Final = "smollm2-135m"
MIB: Final = 1024**2
GIB: Final = 1024**3


def default_home() -> Path:
    """`REVERIE_HOME`, or `~/.reverie`."""
    return Path(os.environ.get("REVERIE_HOME") or Path.home() / ".reverie")
