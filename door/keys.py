"""API keys: two scopes, stored as hashes, compared in constant time.

`use` may ask the model; `teach` may also change it. Without any key the door opens only to this
machine. The file is read again when it changes, so keys can be added and removed while serving.
"""

import hashlib
import hmac
import json
import os
import secrets
import time
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, Literal

from starlette.requests import Request

from actors.errors import NotAuthenticated, NotPermitted, SettingsError

Scope = Literal["use", "teach"]
FORMAT: Final = 1
_PREFIX: Final = "rv-"
_BYTES: Final = 32


class KeyStore:
    """The keys of one `REVERIE_HOME`, in `keys.json` (mode 0600)."""

    def __init__(self, home: Path) -> None:
        self._path = home / "keys.json"
        self._stamp: tuple[int, int] | None = None
        self._keys: list[dict[str, Any]] = []

    def records(self) -> list[dict[str, Any]]:
        """All keys as records of id, scope, sha256 and creation time."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            self._stamp, self._keys = None, []
            return []
        stamp = (status.st_mtime_ns, status.st_ino)
        if stamp != self._stamp:
            try:
                stored = json.loads(self._path.read_text())
                if stored["format"] != FORMAT:
                    raise ValueError(f"format {stored['format']!r}")
                self._keys = [
                    {name: record[name] for name in ("id", "scope", "sha256", "created")}
                    for record in stored["keys"]
                ]
            except (ValueError, KeyError, TypeError) as error:
                raise SettingsError(
                    f"keys.json cannot be read ({error}); mend it or remove it and add keys anew"
                ) from None
            self._stamp = stamp
        return self._keys

    def add(self, scope: Scope) -> str:
        """Make a key and return it: the only time it can be seen."""
        key = _PREFIX + secrets.token_urlsafe(_BYTES)
        record = {
            "id": secrets.token_hex(4),
            "scope": scope,
            "sha256": _digest(key),
            "created": round(time.time()),
        }
        self._write([*self.records(), record])
        return key

    def remove(self, key_id: str) -> bool:
        """Forget a key; False if there is none of that id."""
        kept = [record for record in self.records() if record["id"] != key_id]
        is_found = len(kept) < len(self.records())
        if is_found:
            self._write(kept)
        return is_found

    def check(self, authorization: str | None, scope: Scope) -> str | None:
        """The id of the key that a header carries; None if no keys are configured.

        Raises NotAuthenticated, or NotPermitted if the key's scope does not reach.
        """
        known = self.records()
        if not known:
            return None
        word, _, given = (authorization or "").partition(" ")
        digest = _digest(given.strip())
        found = None
        for record in known:  # All of them, so that the time does not tell which one matched.
            if hmac.compare_digest(digest, record["sha256"]):
                found = record
        if word.lower() != "bearer" or found is None:
            raise NotAuthenticated(
                "a valid API key is needed: send the header 'Authorization: Bearer KEY' "
                "with a key made by 'reverie keys add'"
            )
        if scope == "teach" and found["scope"] != "teach":
            raise NotPermitted(
                "this key may use the model but not teach it; make one with "
                "'reverie keys add --scope teach'"
            )
        return str(found["id"])

    def _write(self, keys: list[dict[str, Any]]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"format": FORMAT, "keys": keys}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self._path)


def require_loopback(request: Request) -> None:
    """Raises NotPermitted if a request came in over an address, or by a name, that others can use.

    The last guard where there are no keys: whoever bound Serve's proxy may not have asked us, and
    a web page whose name was made to resolve to this machine sends its own name as the host.
    """
    server = request.scope.get("server") or ("an unknown address", 0)
    for reached in (str(server[0]), request.url.hostname or ""):
        if not _is_loopback(reached):
            raise NotPermitted(
                f"this door was reached as {reached[:80]!r} and has no API keys; use 127.0.0.1, or "
                "make a key with 'reverie keys add --scope teach' and send it"
            )


def _is_loopback(name: str) -> bool:
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _digest(key: str) -> str:
    # A key is 32 random bytes, so a plain hash of it cannot be searched.
    return hashlib.sha256(key.encode()).hexdigest()
