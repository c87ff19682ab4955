"""API keys: two scopes, stored as hashes, compared in constant time.

`use` may ask the model; `teach` may also change it. Without any key the door opens only to this
machine. The file is read again when it changes, so keys are added, rotated, limited and removed
while serving. What a key has used is counted elsewhere (`quotas.py`); here is only what it may.
"""

import fcntl
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from actors.errors import NotAuthenticated, NotPermitted, SettingsError

Scope = Literal["use", "teach"]
FORMAT: Final = 1
DAY_S: Final = 24 * 3600.0
MAX_PREVIOUS: Final = 4
"""Most secrets of one key that are still taken after they were replaced."""
_PREFIX: Final = "rv-"
_BYTES: Final = 32
_REQUIRED: Final = ("id", "scope", "sha256", "created")
_OPTIONAL: Final = ("quotas", "expires", "previous")


class Quotas(BaseModel):
    """What a key may use; None is without limit. Unknown names are refused, and let nobody in."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    requests_per_minute: int | None = Field(default=None, ge=1, le=100_000)
    """Requests in any 60 seconds, whatever they ask."""
    ongoing: int | None = Field(default=None, ge=1, le=100_000)
    """Requests at once, streams included."""
    tokens_per_day: int | None = Field(default=None, ge=1)
    """Tokens read and written by the model in a day of UTC."""
    samples_per_day: int | None = Field(default=None, ge=0)
    """Samples taught in a day of UTC, approved candidates included."""


def quotas_from(**given: int | None) -> Quotas:
    """Quotas as somebody names them; raises SettingsError that says what is allowed."""
    try:
        return Quotas(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise SettingsError(
            f"{'.'.join(map(str, first['loc']))}={first['input']!r}: {first['msg']}"
        ) from None


Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Previous(BaseModel):
    sha256: Digest
    until: float


class _Record(BaseModel):
    id: str
    scope: Scope
    sha256: Digest
    created: float
    quotas: Quotas = Quotas()
    expires: float | None = None
    previous: list[_Previous] = []


class KeyStore:
    """The keys of one `REVERIE_HOME`, in `keys.json` (mode 0600)."""

    def __init__(self, home: Path) -> None:
        self._path = home / "keys.json"
        self._stamp: tuple[int, int] | None = None
        self._keys: list[dict[str, Any]] = []

    def records(self) -> list[dict[str, Any]]:
        """All keys as records of id, scope, sha256 and creation time.

        Where a key has them: `quotas`, `expires` (seconds since 1970), and `previous`, secrets that
        were replaced and are taken `until` a time.
        """
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
                self._keys = [_checked(record) for record in stored["keys"]]
            except (ValueError, KeyError, TypeError) as error:
                self._stamp = None  # Not what was read before: nobody is let in by that.
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise SettingsError(
                    f"keys.json cannot be read ({reason}); mend it or remove it and add keys anew"
                ) from None
            self._stamp = stamp
        return self._keys

    def add(
        self,
        scope: Scope,
        quotas: Quotas = Quotas(),  # noqa: B008  Frozen.
        expires_in_s: float | None = None,
    ) -> str:
        """Make a key and return it: the only time it can be seen."""
        key = _new_secret()
        record: dict[str, Any] = {
            "id": secrets.token_hex(4),
            "scope": scope,
            "sha256": _digest(key),
            "created": round(time.time()),
        }
        if limits := quotas.model_dump(exclude_none=True):
            record["quotas"] = limits
        if expires_in_s is not None:
            record["expires"] = round(time.time() + expires_in_s)
        with self._changing():
            self._write([*self.records(), record])
        return key

    def rotate(self, key_id: str, overlap_s: float = DAY_S) -> str | None:
        """A new secret for a key, whose old one is taken for `overlap_s` more; None: no such id.

        At most MAX_PREVIOUS older ones stay; of more, those that would end first go at once.
        """
        with self._changing():
            key, now = _new_secret(), time.time()
            for record in self.records():
                if record["id"] != key_id:
                    continue
                olds = [old for old in record.get("previous", []) if old["until"] > now]
                if overlap_s > 0:
                    olds.append({"sha256": record["sha256"], "until": now + overlap_s})
                olds = sorted(olds, key=_until)[-MAX_PREVIOUS:]
                made = record | {"sha256": _digest(key), "previous": olds}
                self._write([made if r["id"] == key_id else r for r in self.records()])
                return key
        return None

    def limit(self, key_id: str, changes: Mapping[str, int | None]) -> Quotas | None:
        """Change some of a key's quotas, None being without limit; all that it has then.

        None if there is no key of that id. Raises SettingsError for what is no quota.
        """
        with self._changing():
            for record in self.records():
                if record["id"] == key_id:
                    quotas = quotas_from(**(record.get("quotas", {}) | dict(changes)))
                    made = record | {"quotas": quotas.model_dump(exclude_none=True)}
                    self._write([made if r["id"] == key_id else r for r in self.records()])
                    return quotas
        return None

    def remove(self, key_id: str) -> bool:
        """Forget a key; False if there is none of that id."""
        with self._changing():
            kept = [record for record in self.records() if record["id"] != key_id]
            is_found = len(kept) < len(self.records())
            if is_found:
                self._write(kept)
        return is_found

    def check(self, authorization: str | None, scope: Scope) -> str | None:
        """The id of the key that a header carries; None if no keys are configured.

        Raises NotAuthenticated, or NotPermitted if the key's scope does not reach.
        """
        found = self.find(authorization, scope)
        return None if found is None else str(found["id"])

    def find(self, authorization: str | None, scope: Scope) -> dict[str, Any] | None:
        """The record of the key that a header carries, as `check` does."""
        known = self.records()
        if not known:
            return None
        word, _, given = (authorization or "").partition(" ")
        digest, now = _digest(given.strip()), time.time()
        found = None
        for record in known:  # All of them, so that the time does not tell which one matched.
            olds = [old["sha256"] for old in record.get("previous", ()) if old["until"] > now]
            for secret in (record["sha256"], *olds):
                if hmac.compare_digest(digest, secret):
                    found = record
        if word.lower() != "bearer" or found is None:
            raise NotAuthenticated(
                "a valid API key is needed: send the header 'Authorization: Bearer KEY' "
                "with a key made by 'reverie keys add'"
            )
        if found.get("expires", now) < now:
            raise NotAuthenticated("this key has expired; send another, made by 'reverie keys add'")
        if scope == "teach" and found["scope"] != "teach":
            raise NotPermitted(
                "this key may use the model but not teach it; make one with "
                "'reverie keys add --scope teach'"
            )
        return found

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """One process at a time reads, changes and writes: none undoes what another just did."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        home = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(home, fcntl.LOCK_EX)
            yield
            os.fsync(home)
        finally:
            os.close(home)

    def _write(self, keys: list[dict[str, Any]]) -> None:
        partial = self._path.with_suffix(".partial")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        descriptor = os.open(partial, flags, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"format": FORMAT, "keys": keys}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self._path)


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    """A record as it is used; raises ValueError, KeyError or TypeError for another."""
    made = {name: record[name] for name in _REQUIRED}
    made |= {name: record[name] for name in _OPTIONAL if name in record}
    _Record.model_validate_json(json.dumps(made), strict=True)
    return made


def _until(old: dict[str, Any]) -> float:
    return float(old["until"])


def _new_secret() -> str:
    return _PREFIX + secrets.token_urlsafe(_BYTES)


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
