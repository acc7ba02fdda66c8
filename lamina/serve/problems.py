"""Errors become answers in the form of OpenAI's API: a status, and one JSON object that says what is wrong."""

from __future__ import annotations

import math
import re

import msgspec

from lamina.errors import CapacityError, HttpError, LaminaError, NodeError, RequestError, StorageError, TransportError

LONGEST_RETRY_S = 119
"""Clients do not retry at all where they are told to wait for longer."""
AWAY_RETRY_S = 1.0
"""After how many seconds a client should ask again while there is no front."""

_PLACE = re.compile(r"[a-z_]+(\[\d+\]|\.\w+)*(?=: )")
"""What a message about a parameter begins with."""
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def as_http(error: Exception) -> HttpError:
    """Return the error that a client is told for one of Lamina's, or for one that nobody expected."""
    match error:
        case HttpError():
            return error
        case RequestError():
            place = _PLACE.match(str(error))
            return HttpError(str(error), param=place[0] if place else None)
        case CapacityError(retry_after_s=None):
            return HttpError(str(error))  # it would never fit
        case CapacityError(retry_after_s=seconds):
            return HttpError(str(error), status=429, kind=_KINDS[429], retry_after_s=seconds)
        case NodeError() | TransportError() | StorageError():
            return unavailable(str(error))
        case LaminaError():
            return HttpError(str(error), status=500, kind="server_error")
    return HttpError("internal error; the log of the server has its cause", status=500, kind="server_error")


def unavailable(message: str) -> HttpError:
    """Return the error for the time in which there is no front that takes requests."""
    return HttpError(message, status=503, kind="server_error", retry_after_s=AWAY_RETRY_S)


def of_status(status: int, message: str) -> HttpError:
    """Return the error of a kind of which HTTP itself speaks."""
    kind = "server_error" if status >= 500 else _KINDS.get(status, "invalid_request_error")
    return HttpError(message, status=status, kind=kind)


def body_of(error: HttpError) -> bytes:
    """Return the JSON text of an error. ``code`` is a number, as some clients end on others."""
    about = {"message": str(error), "type": error.kind, "param": error.param, "code": error.status}
    return msgspec.json.encode({"error": about})


def headers_of(error: HttpError) -> list[tuple[bytes, bytes]]:
    """Return the headers that an answer with this error has beside its type and length."""
    headers = []
    if error.retry_after_s is not None:
        seconds = min(LONGEST_RETRY_S, max(1, math.ceil(error.retry_after_s)))
        headers.append((b"retry-after", str(seconds).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers
