"""What a node knows of the process that it lives in."""

from __future__ import annotations

import os
from random import Random, SystemRandom
from typing import NamedTuple


class Host(NamedTuple):
    """Where the choices of a node come from, and which process says that it is the node.

    A simulation hands in its own, so that two runs with one seed are the same.
    """

    random: Random
    pid: int

    @classmethod
    def own(cls) -> Host:
        """The present process, with the system's randomness."""
        return cls(SystemRandom(), os.getpid())
