"""A node knows its process, and draws random numbers, only through its host."""

from __future__ import annotations

import os
from random import Random, SystemRandom
from typing import NamedTuple


class Host(NamedTuple):
    """Holds the source of a node's random choices, and the number of its process.

    A simulation hands in its own, so that two runs with one seed are the same.
    """

    random: Random
    pid: int

    @classmethod
    def own(cls) -> Host:
        """Return the present process, with the system's randomness."""
        return cls(SystemRandom(), os.getpid())
