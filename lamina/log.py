"""Write structured logs: one line per event, in logfmt or JSON. What a node has to tell its starter goes to that as
well."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from lamina.errors import ConfigError

Format = Literal["logfmt", "json"]
FORMAT_VARIABLE = "LAMINA_LOG_FORMAT"
"""The environment variable that says in which format logs are written."""
REPORT_VARIABLE = "LAMINA_REPORT"
"""The environment variable with the number of the descriptor that a node's reports go to; its starter sets it."""


class NodeReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tells the process that started a node how far its start is, or why it ends.

    A report comes from a log record: one with an extra attribute ``progress``, a text, or ``failure``, an exception.
    """

    progress: str = ""
    failure: str = ""
    blamed: str = ""
    """The other node that the failure is about, if it is about one."""


class _Line(logging.Formatter):
    """Formats a record as ``ts=… level=… node=… logger=… event=… key=value …``, always on one line."""

    def __init__(self, node: str) -> None:
        super().__init__()
        self._node = node

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        message = record.getMessage()
        if not message.startswith("event="):
            message = f"event=message text={message!r}"
        if record.exc_info:
            message += f" error={self.formatException(record.exc_info)!r}"
        message = message.replace("\n", "\\n")
        return (
            f"ts={clock}.{int(record.msecs):03d}Z level={record.levelname.lower()} node={self._node} "
            f"logger={record.name} {message}"
        )


class _JsonLine(logging.Formatter):
    """Formats a record as one JSON object with the keys that a line of logfmt has. Numbers stay numbers."""

    def __init__(self, node: str) -> None:
        super().__init__()
        self._node = node

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        head = {
            "ts": f"{clock}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "node": self._node,
            "logger": record.name,
        }
        if record.exc_info:
            head["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode({**head, **dict(_fields(record)), **head}).decode()


_KEY = re.compile(r"(?:^|\s)(\w+)=")
_PLACE = re.compile(r"%[-#0 +]*\d*(?:\.\d+)?[a-z]")


def _fields(record: logging.LogRecord) -> Iterator[tuple[str, Any]]:
    """Return the keys of an event with their values, as they were given to the logger."""
    template = record.msg
    if not (isinstance(template, str) and template.startswith("event=") and isinstance(record.args, tuple | None)):
        yield from (("event", "message"), ("text", record.getMessage()))
        return
    left = list(record.args or ())
    _, *parts = _KEY.split(template)
    for key, part in zip(parts[::2], parts[1::2], strict=True):
        text = part.strip("'\"")
        count = len(_PLACE.findall(text))
        values, left = left[:count], left[count:]
        yield key, _plain(values[0]) if count == 1 and _PLACE.fullmatch(text) else text % tuple(values)


def _plain(value: object) -> object:
    """Return a value that JSON has, or its text."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | None) else str(value)


class _Reports(logging.Handler):
    """Writes reports to a pipe, one JSON object per line."""

    def __init__(self, node: str, descriptor: int) -> None:
        super().__init__()
        self._node = node
        self._descriptor = descriptor

    def emit(self, record: logging.LogRecord) -> None:
        failure: BaseException | None = getattr(record, "failure", None)
        progress: str = getattr(record, "progress", "")
        if failure is not None:
            blamed = getattr(failure, "node", self._node)
            report = NodeReport(failure=str(failure), blamed="" if blamed == self._node else blamed)
        elif progress:
            report = NodeReport(progress=progress)
        else:
            return
        with suppress(OSError):  # the starter is gone or suspended, and no node waits for it
            os.write(self._descriptor, msgspec.json.encode(report) + b"\n")


def choose_format(asked: str | None = None, configured: Format = "logfmt") -> Format:
    """Return the format that was ``asked`` for, else the one of the environment, else ``configured``.

    ConfigError if there is no such format.
    """
    for place, name in (("--log-format", asked), (FORMAT_VARIABLE, os.environ.get(FORMAT_VARIABLE))):
        if name:
            for known in get_args(Format):
                if name == known:
                    return known  # type: ignore[no-any-return]
            raise ConfigError(f"{place}: expected one of {', '.join(get_args(Format))}; got {name!r:.200}")
    return configured


def report_failure(error: Exception) -> None:
    """Tell the process that started this one why it ends before it has a log, if it asked for reports."""
    descriptor = os.environ.pop(REPORT_VARIABLE, "")
    if descriptor.isdecimal():
        with suppress(OSError):
            os.write(int(descriptor), msgspec.json.encode(NodeReport(failure=str(error))) + b"\n")


def configure(node: str, file: Path | None = None, format_: Format = "logfmt") -> None:
    """Send the log of this process, as the node called ``node``, to ``file``, by default to standard error.

    Reports go to the process that started this one, if it asked for them.
    """
    handler: logging.Handler = logging.FileHandler(file) if file else logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLine(node) if format_ == "json" else _Line(node))
    handlers = [handler]
    descriptor = os.environ.pop(REPORT_VARIABLE, "")  # processes that this one starts have nothing to report
    if descriptor.isdecimal():
        with suppress(OSError):
            os.set_inheritable(int(descriptor), False)
            os.set_blocking(int(descriptor), False)
            handlers.append(_Reports(node, int(descriptor)))
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    logging.captureWarnings(True)
    for noisy in ("torch", "transformers", "py.warnings"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
