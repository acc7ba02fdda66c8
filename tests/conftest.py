"""Settings of all tests."""

from __future__ import annotations

import os

# Test runners and nodes share few cores: one computing thread each. Set before torch is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
