"""Random runs of random clusters: accounts are exact in the end, and nothing waits for ever."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.families import FAMILIES
from tests.sim import chance
from tests.sim.chance import CONTEXT, digest, run_traffic

SEEDS_OF_TRAFFIC, SLOW_SEEDS_OF_TRAFFIC = 10, 400
GROUPS = 2
"""Tests that share the seeds, so that several processes can."""


def shared(start: int, seeds: int) -> list[range]:
    """``seeds`` seeds from ``start`` on, divided among ``GROUPS`` tests."""
    ends = [start + seeds * group // GROUPS for group in range(GROUPS + 1)]
    return [range(*ends) for ends in pairwise(ends)]


def with_slow(default: int, slow: int) -> list[object]:
    marks = (pytest.mark.slow, pytest.mark.timeout(3600))
    return [*shared(0, default), *(pytest.param(seeds, marks=marks) for seeds in shared(default, slow))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "checkpoint"
    return FAMILIES["llama"].save(path, num_hidden_layers=3, max_position_embeddings=CONTEXT)


@pytest.mark.parametrize("seeds", with_slow(SEEDS_OF_TRAFFIC, SLOW_SEEDS_OF_TRAFFIC), ids=str)
def test_every_request_is_answered_and_every_block_comes_back(seeds: range) -> None:
    """Whatever the cluster, with requests that come at random, are given up, and preempt each other."""
    steps = preemptions = 0
    for seed in seeds:
        traffic = run_traffic(seed)
        for asked in traffic.asked:
            assert asked.error is None, f"seed {seed}: {asked.error}"
            assert asked.is_answered or asked.cancelled, f"seed {seed}: {asked}"
        steps += traffic.steps
        preemptions += traffic.preemptions
    assert steps > 100 * len(seeds)
    assert preemptions > 0


@pytest.mark.parametrize("model", ["empty", "llama"])
def test_one_seed_one_trace(model: str, checkpoint: Path) -> None:
    """Two runs with one seed have the same trace, to the byte: with models that compute nothing and with real ones."""
    path = checkpoint if model == "llama" else model
    first, again, other = (run_traffic(seed, path, requests=8, tracing=True) for seed in (3, 3, 4))

    assert len(first.trace) > 2000
    assert first.trace == again.trace
    assert [asked.tokens for asked in first.asked] == [asked.tokens for asked in again.asked]
    assert first.trace != other.trace


def test_one_seed_one_trace_in_every_process(checkpoint: Path) -> None:
    """Neither the hashes of strings nor addresses of objects nor numbers of processes have any effect."""
    models = ["empty", str(checkpoint)]
    here = [digest(run_traffic(5, model, requests=8, tracing=True).trace) for model in models]
    for hash_seed in ("1", "2"):
        answer = subprocess.run(
            [sys.executable, chance.__file__, *models],
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert answer.stdout.split() == here


def test_ended_nodes_leave_no_memory_behind() -> None:
    """The regions of links are free when their nodes have ended, without the garbage collector's help: thousands of
    clusters in one process need no more of them."""
    run_traffic(0, requests=2)
    gc.collect()
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        for seed in range(1, 21):
            run_traffic(seed, requests=2)
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()
