"""The comparison of whole engines: what it counts, what becomes of a peer that fails, and a toy from end to end."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lamina.bench import throughput
from lamina.bench.checkpoints import MODELS, checkpoint
from lamina.bench.installed import Environment, Recipe, UnavailableError
from lamina.bench.systems import CacheDemand, PeerEngine, Sample, Work
from lamina.bench.throughput import Contestant, Turn, parse_shapes, rows_of
from lamina.errors import ConfigError

TOY = MODELS["T"]


def contestant(name: str, *rates: float) -> Contestant:
    """One that decoded 2 x 64 tokens at these rates, while reads took 10 and 30 GB/s."""
    turns = [Turn(Sample(rate, {"compute": 5.0}), before=10.0, after=30.0) for rate in rates]
    return Contestant(name, threads="2", turns={(2, 64): turns})


def test_the_ratio_is_that_of_rounds_to_the_best_peer() -> None:
    """Rounds are compared one by one, so that a machine that changes its speed between them does not matter."""
    own, slow, fast = contestant("lamina", 40, 100, 90), contestant("slow", 5, 5, 5), contestant("fast", 20, 50, 60)
    own_row, slow_row, fast_row = rows_of(TOY, [(2, 64)], [own, slow, fast])
    assert own_row["ratio"] == pytest.approx(2.0)  # of 2, 2 and 1.5
    assert (own_row["best_peer"], own_row["peer_step_ms"]) == ("fast", pytest.approx(2 / 50 * 1e3))
    assert own_row["tokens_per_s"] == 90
    assert own_row["step_ms"] == pytest.approx(2 / 90 * 1e3)
    assert own_row["compute_ms"] == 5.0
    assert slow_row["ratio"] is fast_row["ratio"] is None
    assert own_row["read_ms"] == pytest.approx(TOY.step_bytes(2, 64) / 20e9 * 1e3)
    assert own_row["read_share"] == pytest.approx(own_row["read_ms"] / own_row["step_ms"])


def test_a_missing_peer_is_a_failed_row() -> None:
    """It says why, keeps its place, and is compared with nobody."""
    there, missing = contestant("there", 10), Contestant("missing", failed="cannot be installed: no network")
    own_row, there_row, missing_row = rows_of(TOY, [(2, 64)], [contestant("lamina", 20), there, missing])
    assert own_row["ratio"] == 2.0
    assert missing_row["failed"] == "cannot be installed: no network"
    assert missing_row["tokens_per_s"] is None
    assert missing_row.keys() >= there_row.keys() - {"compute_ms"}


def test_lamina_may_fail_too() -> None:
    """Then nothing is compared; the peer's figures stay."""
    own = Contestant("lamina", failed_at={(2, 64): "out of memory"})
    own_row, peer_row = rows_of(TOY, [(2, 64)], [own, contestant("peer", 10)])
    assert (own_row["failed"], own_row["ratio"]) == ("out of memory", None)
    assert peer_row["tokens_per_s"] == 10


def test_options_are_checked() -> None:
    """What is not known is refused before anything is installed or measured."""
    assert parse_shapes("1x512, 32x2048") == [(1, 512), (32, 2048)]
    for wrong in ("32", "0x512", "1x9999999", "ax16", ""):
        with pytest.raises(ConfigError, match=r"--shapes: expected batch x context"):
            parse_shapes(wrong)
    with pytest.raises(ConfigError, match=r"--peers: expected some of transformers, llama.cpp, vllm, got sglang"):
        throughput.run(["sglang"], ["S"], None, as_json=True, plot=None, quick=True)
    with pytest.raises(ConfigError, match=r"--models: expected some of T, S, M, got XL"):
        throughput.run([], ["XL"], None, as_json=True, plot=None, quick=True)


def test_a_checkpoint_is_made_once_and_has_the_shape_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are bfloat16, the same each time, and as many bytes as a step is said to read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = checkpoint(TOY)
    before = (path / "model.safetensors").read_bytes()
    assert checkpoint(TOY) == path
    assert path.is_relative_to(tmp_path)
    assert list(path.parent.iterdir()) == [path]
    with safe_open(path / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    matrices = {name: tensor.nbytes for name, tensor in tensors.items() if tensor.ndim == 2}
    assert sum(matrices.values()) == TOY.file_bytes
    assert TOY.file_bytes - TOY.weight_bytes == matrices["model.embed_tokens.weight"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert (checkpoint(TOY) / "model.safetensors").read_bytes() == before


def peer(folder: Path, script: str) -> PeerEngine:
    """A peer whose environment is this one, and whose script is ``script``."""
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / "script.py").write_text(script)
    recipe = Recipe(requirements=(), script=str(folder / "script.py"))
    demand = CacheDemand.of([Work(2, 64, warm=1, steps=8)])
    return PeerEngine(Environment("other", folder, recipe), TOY, folder, demand)


ANSWERING = f"""
import sys
sys.path.insert(0, {str(Path(throughput.__file__).parent / "peers")!r})
from lines import serve

def measure(batch, context, **settings):
    print("chatter that is no answer")
    if batch > 2:
        raise ValueError("too many")
    return {{"seconds": 2.0, "detail": f"over {{context}}"}}

serve(lambda: ({{"version": "1.2"}}, measure))
"""


def test_a_peer_answers_line_by_line(tmp_path: Path) -> None:
    """What it prints besides is no answer, and an error in one measurement does not end it."""

    async def scenario() -> None:
        system = peer(tmp_path, ANSWERING)
        await system.start()
        try:
            assert system.version == "1.2"
            threads = system.candidates[0]
            with pytest.raises(UnavailableError, match="other: ValueError: too many"):
                await system.measure(Work(3, 64, warm=1, steps=8), threads)
            sample = await system.measure(Work(2, 64, warm=1, steps=8), threads)
            assert (sample.tokens_per_s, sample.detail) == (2 * 8 / 2.0, "over 64")
        finally:
            await system.close()

    asyncio.run(scenario())


def test_a_peer_that_ends_says_why(tmp_path: Path) -> None:
    """The last error that it printed is the reason."""

    async def scenario() -> None:
        system = peer(tmp_path, "raise ImportError('no such library')")
        with pytest.raises(UnavailableError, match="other has ended: ImportError: no such library"):
            await system.start()
        await system.close()

    asyncio.run(scenario())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_toy_from_end_to_end(tmp_path: Path) -> None:
    """Lamina's real nodes and transformers, installed by the run, decode the same checkpoint; both are in the rows."""
    plot = tmp_path / "plot.png"
    options = ["--peers", "transformers", "--models", "T", "--shapes", "2x64,4x128", "--quick", "--json"]
    command = [sys.executable, "-m", "lamina", "bench", "throughput", *options, "--plot", str(plot)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=880, check=True)
    rows = json.loads(done.stdout)["rows"]
    assert [(row["batch"], row["system"]) for row in rows] == [
        (batch, system) for batch in (2, 4) for system in ("lamina", "transformers")
    ]
    own = [row for row in rows if row["system"] == "lamina"]
    for row in own:
        assert not row["failed"]
        assert row["tokens_per_s"] > 0
        assert row["compute_ms"] > 0
        assert row["attention_ms"] > 0
    for ours, theirs in zip(own, (row for row in rows if row["system"] == "transformers"), strict=True):
        if theirs["failed"]:  # where nothing can be installed
            assert "transformers cannot be installed" in theirs["failed"]
        else:
            assert ours["ratio"] == pytest.approx(ours["tokens_per_s"] / theirs["tokens_per_s"])
            assert plot.stat().st_size > 0
