"""Ray as `reverie up` starts it: on the loopback address, and for nobody without the token.

    RAY_AUTH_TOKEN, else RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token     as Ray looks for it

Whoever has the token may run code there. Ray would make the file itself, readable by whoever the
umask lets; here it is made first, and is nobody else's. And Ray takes 127.0.0.1 for "an address of
this machine that others reach", unless it is told that it shall be no cluster. To be called before
Ray is imported, which reads the environment once.
"""

import os
import secrets
import stat
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

from actors.errors import SettingsError

MODE: Final = "RAY_AUTH_MODE"
TOKEN: Final = "RAY_AUTH_TOKEN"
TOKEN_PATH: Final = "RAY_AUTH_TOKEN_PATH"
CLUSTER: Final = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Of all systems, whatever its name says: "0" keeps all of a node's ports on 127.0.0.1."""
ADDRESS: Final = "RAY_ADDRESS"
CURRENT: Final = Path("/tmp/ray/ray_current_cluster")
"""Where Ray notes the address that `auto` joins."""
_BYTES: Final = 32


def start_here(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have the Ray that is started next be this machine's and this user's only."""
    environment.setdefault(CLUSTER, "0")
    require_token(environment)


def join_here(environment: MutableMapping[str, str] = os.environ, current: Path = CURRENT) -> None:
    """Have Ray look for a node where it is: on 127.0.0.1, if it was started by `start_here`."""
    address = environment.get(ADDRESS)
    if address in (None, "", "auto") and current.is_file():
        address = current.read_text()
    if address is not None and address.strip().startswith("127."):
        environment.setdefault(CLUSTER, "0")


def require_token(environment: MutableMapping[str, str] = os.environ) -> Path | None:
    """Have Ray ask for a token; returns the file that holds it, None if no file does.

    Respects a mode, a token or a file that somebody has named. Raises SettingsError for a file
    that cannot be made private: another user's, say.
    """
    if environment.setdefault(MODE, "token").lower() != "token" or environment.get(TOKEN):
        return None
    named = environment.get(TOKEN_PATH)
    path = Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"
    try:
        if named is None:
            path.parent.mkdir(mode=0o700, exist_ok=True)
        _make(path)
        _close(path)
    except OSError as error:
        raise SettingsError(
            f"Ray's token file {path} cannot be made private ({error.strerror}); remove it, or "
            f"name another with {TOKEN_PATH}"
        ) from None
    return path


def _make(path: Path) -> None:
    """Write a new token, whole or not at all, unless there is one."""
    if path.exists() and path.stat().st_size:
        return
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(_BYTES))
    partial.rename(path)


def _close(path: Path) -> None:
    """Take away what others may do with it; the file that is looked at is the one changed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        status = os.fstat(descriptor)
        if stat.S_IMODE(status.st_mode) & 0o077:
            os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)
