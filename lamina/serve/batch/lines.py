"""The lines of a batch's input: what each asks for, and in which order they are best answered."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from lamina.errors import ConfigError, RequestError
from lamina.validation import explain

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
"""The endpoints that a line may name."""
MAX_LINE = 16 << 20
"""The most bytes of one line."""
MAX_LINES = 1_000_000
_KEY = 2048
"""So much of the beginning of a prompt decides the order: requests that share more are neighbours all the same."""


class InputLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Holds one request, as it stands in the file."""

    custom_id: str
    url: str
    body: dict[str, Any]
    method: str = "POST"


class LinePlace(NamedTuple):
    """Says where a line lies in the file. ``number`` counts from 1, as editors do."""

    number: int
    offset: int
    nbytes: int


class BadLine(NamedTuple):
    """Names a line that cannot be answered, and why."""

    number: int
    custom_id: str | None
    reason: str


class BatchInput(NamedTuple):
    """Holds an input file's index: which lines are requests, sorted so that those with the same beginning follow each
    other, and which are not. ``digest`` tells the file from all others."""

    path: Path
    places: list[LinePlace]
    bad: list[BadLine]
    digest: str
    nbytes: int

    @property
    def total(self) -> int:
        """Return how many lines there are, without empty ones."""
        return len(self.places) + len(self.bad)

    def read(self, places: list[LinePlace]) -> Iterator[tuple[LinePlace, InputLine]]:
        """Read the lines at ``places`` again, one after another."""
        with _open(self.path) as file:
            for place in places:
                file.seek(place.offset)
                yield place, parse(file.read(place.nbytes), place.number)


def read_input(path: Path) -> BatchInput:
    """Read a whole file once and index it: what it keeps is small, whatever the lines hold.

    ConfigError says that the file cannot be read, or has no line, or too many.
    """
    places: list[tuple[bytes, LinePlace]] = []
    bad: list[BadLine] = []
    known: dict[str, int] = {}
    digest = hashlib.sha256()
    offset = number = 0
    with _open(path) as file:
        while line := file.readline(MAX_LINE + 1):
            number += 1
            whole = len(line)
            digest.update(line)
            is_long = whole > MAX_LINE and not line.endswith(b"\n")
            while is_long and (more := file.readline(MAX_LINE)):  # it is hashed and skipped, and never kept
                digest.update(more)
                whole += len(more)
                if more.endswith(b"\n"):
                    break
            if number > MAX_LINES:
                raise ConfigError(f"{path}: more than {MAX_LINES} lines; divide the file")
            if is_long:
                reason = f"line {number} has {whole} bytes; at most {MAX_LINE} are allowed"
                bad.append(BadLine(number, None, reason))
            elif line.strip():
                _index(line, LinePlace(number, offset, whole), known, places, bad)
            offset += whole
    if not (places or bad):
        raise ConfigError(f"{path}: no requests; expected one JSON object a line")
    places.sort()
    return BatchInput(path, [place for _, place in places], bad, digest.hexdigest(), offset)


def _index(
    line: bytes, place: LinePlace, known: dict[str, int], places: list[tuple[bytes, LinePlace]], bad: list[BadLine]
) -> None:
    try:
        request = parse(line, place.number)
    except RequestError as e:
        bad.append(BadLine(place.number, _id_in(line), str(e)))
        return
    if (first := known.setdefault(request.custom_id, place.number)) != place.number:
        reason = (
            f"line {place.number}: custom_id {request.custom_id!r:.100} is that of line {first}; each needs its own"
        )
        bad.append(BadLine(place.number, request.custom_id, reason))
        return
    places.append((_beginning(request), place))


def parse(line: bytes, number: int) -> InputLine:
    """Read one line; a RequestError says what is wrong in it."""
    try:
        plain = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise RequestError(f"line {number} is no JSON: {e}") from e
    try:
        request = msgspec.convert(plain, InputLine)
    except msgspec.ValidationError as e:
        raise RequestError(f"line {number}: {explain(e, plain).replace('table', 'object')}") from e
    if request.method != "POST":
        raise RequestError(f'line {number}: method: expected "POST", got {request.method!r:.100}')
    if request.url not in URLS:
        raise RequestError(f"line {number}: url: expected one of {', '.join(URLS)}; got {request.url!r:.100}")
    if request.body.get("stream"):
        raise RequestError(f"line {number}: body.stream: a batch does not stream; leave it out")
    return request


def _id_in(line: bytes) -> str | None:
    """Return the id of a line that is otherwise wrong, if it can be made out."""
    try:
        plain = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    found = plain.get("custom_id") if isinstance(plain, dict) else None
    return found if isinstance(found, str) else None


def _beginning(request: InputLine) -> bytes:
    """Return what sorts requests with equal beginnings of their prompts together."""
    body = request.body
    prompt = next((body[key] for key in ("messages", "prompt", "input") if key in body), None)
    before = [body.get("model"), body.get("tools"), body.get("instructions")]
    return msgspec.json.encode([request.url, before, prompt])[:_KEY]


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from e
