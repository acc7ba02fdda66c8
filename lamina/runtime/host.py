"""A node knows its process, draws random numbers and keeps files only through its host."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from random import Random, SystemRandom
from typing import NamedTuple

from lamina.runtime.storage import LocalLog, LogFile


class Host(NamedTuple):
    """Holds the source of a node's random choices, the number of its process, and what opens its log files.

    A simulation hands in its own, so that two runs with one seed are the same.
    """

    random: Random
    pid: int
    open_log: Callable[[Path], LogFile] = LocalLog

    @classmethod
    def own(cls) -> Host:
        """Return the present process, with the system's randomness."""
        return cls(SystemRandom(), os.getpid())
