"""The tests in ``inside`` are collected only where they can run: under ``uml.py``, by ``test_under_uml.py``."""

from __future__ import annotations

from pathlib import Path

collect_ignore = [] if Path("/sys/class/infiniband/rxe1").exists() else ["inside"]
