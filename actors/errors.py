"""The one tree of exceptions: each maps to one HTTP status and survives pickling.

Ray rebuilds an exception from its `args`, so every constructor takes exactly one message.
What a message is about (`param`, `retry_after_s`) are attributes, which travel in `__dict__`.
"""

from math import ceil
from typing import ClassVar, Self


class ReverieError(Exception):
    """Root of everything Reverie raises on purpose; the message says what to do about it."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    retry_after_s: int | None = None
    param: str | None = None

    def __init__(self, message: str) -> None:
        super().__init__(message)

    def about(self, param: str) -> Self:
        """Name the request key, or the setting, that is at fault."""
        self.param = param
        return self

    def again_in(self, seconds: float) -> Self:
        """Say when the same request can succeed, where that is known."""
        self.retry_after_s = max(1, ceil(seconds))
        return self


class InvalidRequest(ReverieError):
    """The request is well-formed JSON of the wrong content; nothing of it was kept."""

    status = 422
    kind = "invalid_request_error"


class MalformedRequest(ReverieError):
    """The body is not what its content type says."""

    status = 400
    kind = "invalid_request_error"


class NotAuthenticated(ReverieError):
    """No key, or a key that is not known."""

    status = 401
    kind = "authentication_error"


class NotPermitted(ReverieError):
    """A known key without the scope that the route needs, or a page of another origin."""

    status = 403
    kind = "permission_error"


class NotFound(ReverieError):
    """The named job, route or generation does not exist."""

    status = 404
    kind = "not_found_error"


class TooSlow(ReverieError):
    """A body did not arrive within its time."""

    status = 408
    kind = "invalid_request_error"


class Conflict(ReverieError):
    """The request contradicts what is already recorded."""

    status = 409
    kind = "conflict_error"


class TooLarge(ReverieError):
    """A body or a sample is over its limit."""

    status = 413
    kind = "invalid_request_error"


class TooBusy(ReverieError):
    """A bounded queue is full; the same request can succeed later."""

    status = 429
    kind = "rate_limit_error"
    retry_after_s = 5


class OverQuota(ReverieError):
    """A key has used up what it may; `param` names the quota, and it is said when there is more."""

    status = 429
    kind = "rate_limit_error"
    retry_after_s = 60


class Unavailable(ReverieError):
    """The cell is starting, stopping or recovering."""

    status = 503
    kind = "service_unavailable_error"
    retry_after_s = 5


class OnTrial(Unavailable):
    """The live weights hold a dream round that the gate has not judged yet."""


class Unrecorded(Unavailable):
    """An act cannot be noted in the audit file, and so it was not done."""

    retry_after_s = 60


class SettingsError(ReverieError):
    """A setting is unknown, out of range, or contradicts another; nothing was started."""

    kind = "settings_error"


class BootFailed(ReverieError):
    """The cell did not come up; the message carries the stage and its cause."""

    kind = "boot_error"


class CheckpointFailed(ReverieError):
    """Nothing was published: the public directory is what it was before."""

    status = 507
    kind = "checkpoint_error"
