"""Write structured logs: one line per event, in logfmt. What a node has to tell its starter goes to that as well."""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec

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


def configure(node: str, file: Path | None = None) -> None:
    """Send the log of this process, as the node called ``node``, to ``file``, by default to standard error.

    Reports go to the process that started this one, if it asked for them.
    """
    handler: logging.Handler = logging.FileHandler(file) if file else logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line(node))
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
