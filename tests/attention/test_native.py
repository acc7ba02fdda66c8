"""The native library as its caller meets it: how it is found, its threads, and what they may change."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lamina.attention import KVLayout, LayerShape, Partial, Rows, Run
from lamina.attention.backend import create_backend
from lamina.attention.native.build import LIBRARY, BuildError, build, compiler
from lamina.attention.native.library import Workers, available_isas
from lamina.attention.pool import Memory
from lamina.errors import ConfigError, UsageError


def missing() -> str:
    """Why there is no library, if that is because nothing here can compile one; else nothing."""
    try:
        compiler()
    except BuildError as error:
        return "" if LIBRARY.exists() else str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

SHAPE = LayerShape(q_heads=8, kv_heads=2, qk_dim=64, v_dim=64, scale=0.125)
CONTEXTS = (5000, 3, 2500)


def attend(contexts: tuple[int, ...], *, threads: int, dtype: str = "bfloat16") -> Partial:
    """One new token for each context; a context's content depends on its length alone."""
    layout = KVLayout(layers=(SHAPE,), dtype=dtype)
    memory = Memory(32 << 20)
    backend = create_backend("native", layout, memory, threads=threads)
    q, new = [], []
    for sequence, context in enumerate(contexts):
        generator = torch.Generator().manual_seed(context)
        k = torch.randn(context + 1, 2, 64, generator=generator)
        backend.cache.reserve(sequence, context + 1)
        backend.append(0, Rows((Run(sequence, 0, context),)), k[:-1], k[:-1])
        new.append(k[-1:])
        q.append(torch.randn(1, 8, 64, generator=generator))
    plan = backend.plan(Rows(tuple(Run(i, context, 1) for i, context in enumerate(contexts))))
    rows, k = torch.cat(q), torch.cat(new)
    whole = backend.finish(plan, 0, rows, k, k, backend.past(plan, 0, rows))
    backend.close()
    memory.close()
    return whole


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_neither_threads_nor_batch_mates_change_a_bit(dtype: str) -> None:
    """A request's tokens are its own: a long context in parts is cut in the same way alone and in company."""
    together = attend(CONTEXTS, threads=1, dtype=dtype)
    for threads in (1, 2, 3):
        again = attend(CONTEXTS, threads=threads, dtype=dtype)
        assert torch.equal(again.o, together.o)
        assert torch.equal(again.lse, together.lse)
    for i, context in enumerate(CONTEXTS):
        alone = attend((context,), threads=2, dtype=dtype)
        assert torch.equal(alone.o[0], together.o[i])
        assert torch.equal(alone.lse[0], together.lse[i])


def test_threads_come_and_go_in_many_small_steps() -> None:
    """The caller does not wait for a thread that comes too late, which must then leave the next step alone."""
    rows = Rows(tuple(Run(sequence, 0, 1) for sequence in range(40)))
    q, k = torch.randn(40, 8, 64), torch.randn(40, 2, 64)
    memory = Memory(4 << 20)
    backend = create_backend("native", KVLayout(layers=(SHAPE,), dtype="bfloat16"), memory, threads=3)
    for sequence in range(40):
        backend.cache.reserve(sequence, 1)
    plan = backend.plan(rows)
    first = backend.finish(plan, 0, q, k, k, backend.past(plan, 0, q))
    for _ in range(300):
        again = backend.finish(plan, 0, q, k, k, backend.past(plan, 0, q))
        assert torch.equal(again.o, first.o)
        assert torch.equal(again.lse, first.lse)
    backend.close()
    memory.close()


def test_queries_may_be_of_another_type_than_keys() -> None:
    q, k = torch.randn(1, 8, 64), torch.randn(1, 2, 64).bfloat16()
    memory = Memory(1 << 20)
    backend = create_backend("native", KVLayout(layers=(SHAPE,), dtype="bfloat16"), memory)
    backend.cache.reserve(0, 1)
    plan = backend.plan(Rows((Run(0, 0, 1),)))
    past = backend.past(plan, 0, q)
    whole, same = backend.finish(plan, 0, q, k, k, past), backend.finish(plan, 0, q, k.float(), k, past)
    assert torch.equal(whole.o, k.float().repeat_interleave(4, 1))
    assert torch.equal(whole.lse, same.lse)
    backend.close()
    memory.close()


def test_a_window_beyond_32_bits_is_no_window() -> None:
    """Positions have 64 bits, and a window that reaches everything hides nothing."""
    outputs = []
    for window in (None, 2**31, 2**32 + 5):
        shape = LayerShape(q_heads=2, kv_heads=1, qk_dim=64, v_dim=64, scale=0.125, window=window)
        backend = create_backend("native", KVLayout(layers=(shape,), dtype="float32"), Memory(1 << 20))
        backend.cache.reserve(0, 40)
        q, k = torch.ones(40, 2, 64), torch.arange(40.0).view(40, 1, 1).expand(40, 1, 64)
        plan = backend.plan(Rows((Run(0, 0, 40),)))
        outputs.append(backend.finish(plan, 0, q, k, k, backend.past(plan, 0, q)).o)
        backend.close()
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_threads_start_and_end_many_times() -> None:
    for threads in (1, 2, 5) * 20:
        workers = Workers(threads)
        workers.read(torch.zeros(4096 * threads, dtype=torch.uint8))
        workers.close()
        workers.close()


def test_processors_that_are_not_there() -> None:
    missing = max(os.sched_getaffinity(0)) + 1
    with pytest.raises(ConfigError, match=rf"attention cpus: expected some of .*, got \[{missing}\]"):
        Workers(2, [0, missing])


@pytest.mark.parametrize("threads", [0, -1, 10_000_000])
def test_an_impossible_number_of_threads(threads: int) -> None:
    with pytest.raises(ConfigError, match=f"attention threads: expected 1 to 1024, got {threads}"):
        Workers(threads)


def test_the_caller_keeps_its_processors() -> None:
    """Only the other threads are pinned: what the caller starts later must not all land on one processor."""
    before = os.sched_getaffinity(0)
    workers = Workers(2, [min(before)])
    workers.read(torch.zeros(8192, dtype=torch.uint8))
    assert os.sched_getaffinity(0) == before
    workers.close()


def test_an_instruction_set_that_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_ISA", "mmx")
    with pytest.raises(ConfigError, match=f"LAMINA_ISA: expected one of {', '.join(available_isas())}.*'mmx'"):
        Workers(1)


def test_a_closed_backend_says_so() -> None:
    backend = create_backend("native", KVLayout(layers=(SHAPE,), dtype="float32"), Memory(1 << 20))
    backend.cache.reserve(0, 2)
    plan = backend.plan(Rows((Run(0, 0, 1),)))
    backend.close()
    with pytest.raises(UsageError, match="closed"):
        backend.past(plan, 0, torch.zeros(1, 8, 64))


def test_a_forked_process_is_refused_and_does_not_hang() -> None:
    """The threads stay behind in the parent, so waiting for them would never end."""
    script = """
import os, sys, torch
from lamina.attention.native.library import Workers
from lamina.errors import UsageError
workers = Workers(2)
if os.fork() == 0:
    try:
        workers.read(torch.zeros(8192, dtype=torch.uint8))
    except UsageError as error:
        sys.exit(0 if "fork" in str(error) else 1)
    sys.exit(2)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


def test_read_takes_whole_pages() -> None:
    workers = Workers(1)
    with pytest.raises(UsageError, match="multiple of 4096 bytes, got 100"):
        workers.read(torch.zeros(100, dtype=torch.uint8))
    workers.close()


LOAD = """
import sys
from lamina.errors import ConfigError
try:
    import lamina.attention.native_backend
except ConfigError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize(
    ("library", "message"), [("nowhere.so", "cannot be loaded"), ("libm.so.6", "is not a library")]
)
def test_a_missing_or_foreign_library(library: str, message: str) -> None:
    """A library that is not this kernel's is refused, with what to do."""
    environment = {**os.environ, "LAMINA_NATIVE_LIBRARY": library}
    done = subprocess.run(
        [sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert "python -m lamina.attention.native.build" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_compiler_and_a_failing_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(BuildError, match=r"false .*failed"):
        build(tmp_path / "library.so")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"\$CXX.*no-such-compiler"):
        build(tmp_path / "library.so")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="no C\\+\\+ compiler found"):
        build(tmp_path / "library.so")
    assert not list(tmp_path.iterdir())
