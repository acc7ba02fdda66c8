"""The attention benchmark: what it compares computes the same thing, and what it counts is what is read."""

import json
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from lamina.attention.pool import Memory
from lamina.bench import attention
from lamina.bench.contenders import LIBRARIES, Content, OwnBackend, Point
from lamina.errors import ConfigError

# Of normally distributed values: rounding the cache, and in some libraries the probabilities and the output, to 8 or 16
# bits costs this much at most.
TOLERANCE = {"float8_e4m3fn": 0.1, "int8": 0.03, "bfloat16": 0.02, "float16": 0.02, "float32": 1e-5}


def available(name: str) -> str:
    if why := LIBRARIES[name].unavailable():
        pytest.skip(why)
    return name


@pytest.mark.parametrize("gqa", [1, 4])
@pytest.mark.parametrize("name", LIBRARIES)
def test_every_library_attends_to_the_same_content(name: str, gqa: int) -> None:
    """What is compared is the same attention: each library's output is that of float64, in each layer."""
    library = LIBRARIES[available(name)]
    for kv_dtype in library.kv_dtypes:
        point = Point(kv_dtype=kv_dtype, batch=2, context=300, gqa=gqa, head_dim=64)
        content, position = Content.of(point), torch.arange(point.context)
        k, v = (x.double()[position % len(x)].repeat_interleave(gqa, 1) for x in (content.k, content.v))
        weights = (torch.einsum("bhd,khd->bhk", content.q.double(), k) / 8).softmax(-1)
        expected = torch.einsum("bhk,khd->bhd", weights, v)

        memory = Memory(library.nbytes(point, 3))
        contender = library.make(point, 3, memory, 2)
        for layer in range(3):
            error = (contender.attend(layer).double() - expected).abs().max().item()
            assert error < TOLERANCE[kv_dtype], f"{kv_dtype}, layer {layer}"
        contender.close()
        memory.close()


@pytest.mark.parametrize("name", ["native", "torch"])
def test_blocks_come_in_random_order(name: str) -> None:
    """The blocks of a sequence are no neighbours, as on a node that has served for a while."""
    point = Point(kv_dtype="bfloat16", batch=1, context=1024, gqa=1, head_dim=64)
    memory = Memory(LIBRARIES[available(name)].nbytes(point, 2))
    own = OwnBackend(name, point, 2, memory, 1)
    (table,) = own.backend.cache.place(own.rows).tables(0)
    (size,) = own.backend.cache.block_bytes
    neighbours = sum(after - before == size for before, after in pairwise(table))
    assert neighbours < len(table) / 4
    own.close()
    memory.close()


@pytest.mark.parametrize(("kv_dtype", "per_head"), [("bfloat16", 512), ("int8", 256 + 8), ("float8_e4m3fn", 256 + 8)])
def test_only_keys_values_and_scales_count(kv_dtype: str, per_head: int) -> None:
    """The bytes of a point are those of its keys, values and scales, and of nothing else."""
    point = Point(kv_dtype=kv_dtype, batch=3, context=1000, gqa=4, head_dim=128)
    assert point.kv_bytes == 3 * 1000 * 8 * per_head


def test_impossible_options_are_refused() -> None:
    """An unknown backend or more threads than cores is refused before anything is measured."""
    with pytest.raises(ConfigError, match=r"--backend: expected one of native, .*, got cuda"):
        attention.run(["cuda"], threads=1, as_json=True, plot=None, quick=True)
    with pytest.raises(ConfigError, match=r"--threads: expected at most \d+, .* got 100000"):
        attention.run(None, threads=100000, as_json=True, plot=None, quick=True)


@pytest.mark.slow
def test_a_quick_run_reports_every_phase() -> None:
    """`lamina bench attention --quick --json` prints one object: the machine, and rows of each phase."""
    available("native")
    command = [sys.executable, "-m", "lamina", "bench", "attention", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    found = json.loads(done.stdout)
    assert found["machine"]["read_gbps"] > 0
    assert {row["phase"] for row in found["rows"]} == {"decode", "append", "prefill"}
    native = [row for row in found["rows"] if row["phase"] == "decode" and row["backend"] == "native"]
    assert {(row["batch"], row["context"]) for row in native} == {(16, 2048), (1, 32768)}
    for row in native:
        assert 0 < row["ratio"] < 1.5
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["attend_us"] * 1e6)
