"""Write structured logs: one line per event, in logfmt, on standard error."""

from __future__ import annotations

import logging
import sys
import time


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


def configure(node: str) -> None:
    """Send the log of this process to standard error, as the node called ``node``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line(node))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for noisy in ("torch", "transformers", "py.warnings"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
