"""Commands beside a running cluster: what they take, what they print, and where that cannot be printed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamina.config import ClusterConfig
from tests import harness
from tests.families import FAMILIES

LAMINA = [sys.executable, "-P", "-m", "lamina"]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ClusterConfig, dict[str, harness.Node]]]:
    """A running cluster of one compute and one memory node, with a tokenizer."""
    folder = tmp_path_factory.mktemp("cluster")
    config = harness.write_config(folder, harness_checkpoint(), harness.free_ports(1))
    started = {node.name: harness.start_node(config, node.name) for node in config.node}
    with harness.running(*started.values()):
        harness_ready(config, started["c0"])
        yield config, started
