"""``python -m tests.serve.counted ARGUMENTS`` is the ``lamina`` command, which tells of its tasks on SIGUSR2."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from typing import Any

MARK = "tasks of the main loop: "


def _tell(*_: Any) -> None:
    """Write a line with the number of tasks by the names of their coroutines."""
    names = Counter(getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks())
    os.write(2, f"\n{MARK}{json.dumps(names)}\n".encode())


if __name__ == "__main__":
    from lamina.cli import main

    signal.signal(signal.SIGUSR2, _tell)
    main()
