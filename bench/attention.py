"""Attention on a memory node, beside other libraries and beside the bandwidth of the machine's memory.

Decode is bound by the bytes of the KV cache, so the benchmark reports the share of the read bandwidth that it reaches.
The bandwidth of a virtual machine changes within minutes. A plain read with as many threads therefore precedes and
follows every sample, the sample is compared with the mean of the two reads, and the median of these ratios is reported.
Samples go around layers that together are ten times as large as the last-level caches, so that no byte is still cached
when it is read again. For our own backends, the same work over a context that stays in those caches is shown beside it:
this is what arithmetic allows on this machine, and it is the limit where it is below the read bandwidth.

Prefill is bound by arithmetic and is compared with torch. Appending is shown beside the attention of the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lamina.attention.pool import Memory
from lamina.attention.rows import Rows, Run
from lamina.bench import plots, report
from lamina.bench.bandwidth import Bandwidth, OtherWork, cache_bytes, check_threads, free_bytes, in_turns, read_bytes
from lamina.bench.contenders import LIBRARIES, Content, OwnBackend, Point, layout_of, scattered
from lamina.errors import CapacityError, ConfigError
from lamina.table import print_text

Machine = dict[str, Any]

SHAPES = ((1, 2048), (1, 8192), (1, 32768), (16, 512), (16, 2048), (16, 8192), (32, 2048))
"""Batch and context."""
MAIN_SHAPES = ((16, 2048), (1, 32768))
"""The shapes of a quick run, at which other libraries are also measured with all of these heads."""
GQA, HEAD_DIMS = (4, 8), (128, 64)
HEADS = tuple(product(GQA, HEAD_DIMS))
COMMON_TYPES = ("bfloat16", "float8_e4m3fn", "int8")
"""The types of our own backends that are measured at all shapes; others, and rare GQA, are measured at one shape."""
RARE_SHAPE, RARE_GQA = (16, 2048), (1, 16)

APPEND_SHAPE = (32, 2048)
PREFILLS = ((512, 0), (512, 1024), (2048, 0), (2048, 1024))
"""New tokens, and tokens before them."""
QUICK_PREFILLS = PREFILLS[:1]
PREFILL_LAYERS = 2

SHORT = {"bfloat16": "bf16", "float8_e4m3fn": "fp8", "float16": "f16", "float32": "f32"}

CACHES = 10
"""How many times the size of the last-level caches is read between two visits of a byte."""
CACHED_SHARE = 4
"""A context that is to stay in the last-level caches takes this fraction of them: one part in four."""
MAX_BYTES = 6 << 30
"""The most memory to take, including the buffer for plain reads. Half of the free memory is the other limit."""


COLUMNS = {
    "decode": {
        "backend": "backend",
        "kv": "KV",
        "shape": "BxC",
        "gqa": "GQA",
        "head_dim": "head",
        "threads": "cores",
        "tokens_per_s": "tokens/s",
        "gbps": "GB/s",
        "read_gbps": "read",
        "ratio": "ratio",
        "cached_gbps": "cached",
    },
    "append": {
        "backend": "backend",
        "kv": "KV",
        "shape": "BxC",
        "attend_us": "attend µs",
        "append_us": "append µs",
        "append_share": "append/attend",
        "finish_us": "finish µs",
    },
    "prefill": {
        "backend": "backend",
        "kv": "KV",
        "new": "new",
        "past": "past",
        "attend_us": "µs",
        "tokens_per_s": "tokens/s",
        "gflops": "GFLOP/s",
        "sdpa_ratio": "x sdpa",
    },
}
"""The columns of each phase's table."""


def run(backends: list[str] | None, *, threads: int | None, as_json: bool, plot: Path | None, quick: bool) -> None:
    """Measure and print; draw into ``plot`` if it is given."""
    plots.check(plot)
    console = Console(stderr=True)
    threads = check_threads(threads)
    names = _usable(backends, console)
    machine, rows = _measure(names, threads, console, quick=quick)
    result = report.Result("attention", "samples read from memory, not from caches", rows, machine)
    if as_json:
        report.print_json(result)
    else:
        _print(rows, machine)
    if plot:
        plots.draw(plot, result)


def _usable(backends: list[str] | None, console: Console) -> list[str]:
    """Return the names of the libraries to measure.

    Without ``backends`` these are the installed ones; a note names each library that is left out.
    """
    unknown = sorted(set(backends or ()) - LIBRARIES.keys())
    if unknown:
        raise ConfigError(f"--backend: expected one of {', '.join(LIBRARIES)}, got {', '.join(unknown)}")
    usable = []
    for name in dict.fromkeys(backends or [name for name, library in LIBRARIES.items() if library.default]):
        why = LIBRARIES[name].unavailable()
        if why and backends:
            raise ConfigError(f"--backend {name}: {why}")
        if why:
            print_text(f"{name} is left out: {why}", console)
        else:
            usable.append(name)
    return usable


def _measure(names: list[str], threads: int, console: Console, *, quick: bool) -> tuple[Machine, list[report.Row]]:
    own = [name for name in names if LIBRARIES[name].own]
    jobs = [("decode", name, point, threads) for name, point in _grid(names, quick=quick)]
    if threads > 1 and not quick:
        main = [_point(*shape, kv, *heads) for shape in MAIN_SHAPES for kv in COMMON_TYPES for heads in HEADS]
        jobs += [("decode", name, point, 1) for name in own for point in main]
    jobs += [("append", name, _point(*APPEND_SHAPE, kv_dtype), threads) for name in own for kv_dtype in COMMON_TYPES]
    limit = min(MAX_BYTES, free_bytes() // 2) - read_bytes()
    fitting = [job for job in jobs if _nbytes(*job[1:3]) <= limit]
    if not fitting:
        needed = min(_nbytes(*job[1:3]) for job in jobs) + read_bytes()
        raise CapacityError(
            f"bench attention: needs {needed / 2**30:.1f} GiB of memory to exceed caches of {cache_bytes() >> 20} MiB, "
            f"but may take {(limit + read_bytes()) / 2**30:.1f} GiB: half of what is free, at most "
            f"{MAX_BYTES >> 30} GiB"
        )
    if len(fitting) < len(jobs):
        missing = f"{len(jobs) - len(fitting)} of {len(jobs)} points are left out"
        print_text(f"{missing}: they need more than {limit / 2**30:.1f} GiB of memory", console)
    prefills = QUICK_PREFILLS if quick else PREFILLS

    torch.set_num_threads(threads)
    others, rows = OtherWork(), []
    bench = _AttentionBench(threads, max(_nbytes(*job[1:3]) for job in fitting))
    try:
        machine = {**report.machine(), **bench.machine()}
        with report.progress(console) as progress:
            task = progress.add_task("attention", total=len(fitting) + len(prefills))
            for phase, name, point, used in fitting:
                rows.append(bench.decode(name, point, used) if phase == "decode" else bench.append(name, point))
                progress.advance(task)
            for new, past in prefills:
                rows += bench.prefill(own, new, past, sdpa="sdpa" in names)
                progress.advance(task)
    finally:
        bench.close()
    machine["other_cores"] = others.mention(console)
    return machine, rows


def _grid(names: list[str], *, quick: bool) -> list[tuple[str, Point]]:
    """Return the points to measure, sorted so that what is compared is measured within about the same minute."""
    grid = []
    for name in names:
        library = LIBRARIES[name]
        types = [kv_dtype for kv_dtype in library.kv_dtypes if kv_dtype in COMMON_TYPES or not library.own]
        points = [_point(*shape, kv_dtype) for shape in (MAIN_SHAPES if quick else SHAPES) for kv_dtype in types]
        if not quick:
            shapes = SHAPES if library.own else MAIN_SHAPES
            points += [_point(*shape, kv, *heads) for shape in shapes for kv in types for heads in HEADS[1:]]
            points += [_point(*RARE_SHAPE, types[0], gqa) for gqa in RARE_GQA]
            points += [_point(*RARE_SHAPE, kv_dtype) for kv_dtype in library.kv_dtypes if kv_dtype not in types]
        grid += [(name, point) for point in points]
    return sorted(grid, key=lambda entry: (entry[1].batch, entry[1].context, entry[1].head_dim, entry[1].gqa))


def _point(batch: int, context: int, kv_dtype: str, gqa: int = GQA[0], head_dim: int = HEAD_DIMS[0]) -> Point:
    return Point(kv_dtype=kv_dtype, batch=batch, context=context, gqa=gqa, head_dim=head_dim)


def _layers(point: Point) -> int:
    """Return the number of layers whose keys and values together are too large to stay in the caches."""
    return -(-CACHES * cache_bytes() // point.kv_bytes)


def _nbytes(name: str, point: Point) -> int:
    return LIBRARIES[name].nbytes(point, _layers(point))


class _AttentionBench:
    """The bandwidth yardstick, and one memory of ``nbytes`` which the caches of all contenders use in turn."""

    def __init__(self, threads: int, nbytes: int) -> None:
        self._threads = threads
        self._bandwidth = Bandwidth(threads)
        self._memory = Memory(nbytes)
        self._cached: dict[tuple[str, str, int, int, int], float] = {}

    def close(self) -> None:
        self._bandwidth.close()
        self._memory.close()

    def machine(self) -> Machine:
        return {
            "llc_bytes": cache_bytes(),
            "isa": self._bandwidth.isa,
            "threads": self._threads,
            "read_gbps_one_thread": self._bandwidth.one_thread(),
            "read_gbps": self._bandwidth.all_threads(),
        }

    def decode(self, name: str, point: Point, threads: int) -> report.Row:
        """Measure one token of each sequence attending to its context, with ``threads`` threads: one or all."""
        library, layers = LIBRARIES[name], _layers(point)
        contender = library.make(point, layers, self._memory, threads)
        try:
            found = self._bandwidth.compare(
                contender.attend, layers, point.kv_bytes, one=threads == 1, settle=not library.own
            )
        finally:
            contender.close()
        return {
            **self._about("decode", name, point),
            "threads": threads,
            "layers": layers,
            "attend_us": found.seconds * 1e6,
            "gbps": found.gbps,
            "read_gbps": found.read_gbps,
            "ratio": found.ratio,
            "tokens_per_s": point.batch / found.seconds,
            "cached_gbps": self._in_cache(name, point, threads) if library.own else None,
        }

    def _in_cache(self, name: str, point: Point, threads: int) -> float:
        """Return the GB/s for one sequence in one layer that stays in the last-level caches, shaped like ``point``."""
        key = (name, point.kv_dtype, point.gqa, point.head_dim, threads)
        if key not in self._cached:
            token_bytes = point.kv_bytes // (point.batch * point.context)
            small = replace(point, batch=1, context=cache_bytes() // CACHED_SHARE // token_bytes)
            contender = LIBRARIES[name].make(small, 1, self._memory, threads)
            try:
                seconds = in_turns({"attend": contender.attend}, 1)["attend"]
            finally:
                contender.close()
            self._cached[key] = small.kv_bytes / seconds / 1e9
        return self._cached[key]

    def append(self, name: str, point: Point) -> report.Row:
        """Measure storing the keys and values of new tokens, alone and as part of ``finish``."""
        layers = _layers(point)
        own = OwnBackend(name, point, layers, self._memory, self._threads)
        backend, rows, plan, content = own.backend, own.rows, own.plan, Content.of(point, tokens=point.batch)
        q, k, v = content.q, content.k, content.v
        try:
            past = backend.past(plan, 0, q)
            calls: dict[str, Callable[[int], object]] = {
                "attend_us": lambda layer: backend.past(plan, layer, q),
                "append_us": lambda layer: backend.append(layer, rows, k, v),
                "finish_us": lambda layer: backend.finish(plan, layer, q, k, v, past),
            }
            seconds = in_turns(calls, layers)
        finally:
            own.close()
        return {
            **self._about("append", name, point),
            **{call: found * 1e6 for call, found in seconds.items()},
            "append_share": seconds["append_us"] / seconds["attend_us"],
        }

    def prefill(self, own: list[str], new: int, past: int, *, sdpa: bool) -> list[report.Row]:
        """Measure storing ``new`` tokens of one sequence and their attention to each other and to ``past`` tokens."""
        calls: dict[tuple[str, str], Callable[[int], object]] = {}
        with ExitStack() as stack:
            if sdpa:
                calls["sdpa", "bfloat16"] = _sdpa_prefill(new, past)
            for name, kv_dtype in product(own, COMMON_TYPES):
                calls[name, kv_dtype] = stack.enter_context(_own_prefill(name, kv_dtype, new, past, self._threads))
            seconds = in_turns(calls, PREFILL_LAYERS) if calls else {}
        rows = []
        for (name, kv_dtype), found in seconds.items():
            point = _point(1, past + new, kv_dtype)
            flops = 4 * point.q_heads * point.head_dim * (new * past + new * (new + 1) // 2)
            rows.append(
                {
                    **self._about("prefill", name, point),
                    "new": new,
                    "past": past,
                    "attend_us": found * 1e6,
                    "tokens_per_s": new / found,
                    "gflops": flops / found / 1e9,
                    "sdpa_ratio": seconds["sdpa", "bfloat16"] / found if sdpa else None,
                }
            )
        return rows

    def _about(self, phase: str, name: str, point: Point) -> report.Row:
        return {"phase": phase, "backend": name, **asdict(point), "threads": self._threads}


def _sdpa_prefill(new: int, past: int) -> Callable[[int], object]:
    q, k, v = _prompt(_point(1, past + new, "bfloat16"), new, past)
    query = q.transpose(0, 1).unsqueeze(0)
    caches = [(k.transpose(0, 1).unsqueeze(0).clone(), v.transpose(0, 1).unsqueeze(0).clone())] * PREFILL_LAYERS
    # Without a past, torch needs no mask and is faster.
    visible = torch.ones(new, past + new, dtype=torch.bool).tril(past) if past else None

    def attend(layer: int) -> object:
        return scaled_dot_product_attention(query, *caches[layer], visible, is_causal=not past, enable_gqa=True)

    return attend


@contextmanager
def _own_prefill(name: str, kv_dtype: str, new: int, past: int, threads: int) -> Iterator[Callable[[int], object]]:
    point = _point(1, past + new, kv_dtype)
    q, k, v = _prompt(point, new, past)
    memory = Memory(LIBRARIES[name].nbytes(point, PREFILL_LAYERS))
    backend = scattered(name, layout_of(point, PREFILL_LAYERS), memory, threads)
    try:
        backend.cache.reserve(0, past + new)
        for layer in range(PREFILL_LAYERS if past else 0):
            backend.append(layer, Rows((Run(0, 0, past),)), k[:past], v[:past])
        plan = backend.plan(Rows((Run(0, past, new),)))
        yield lambda layer: backend.finish(plan, layer, q, k[past:], v[past:], backend.past(plan, layer, q))
    finally:
        backend.close()
        memory.close()


def _prompt(point: Point, new: int, past: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [new, Hq, D] and k, v [past + new, 8, D]."""
    content = Content.of(point, tokens=past + new)
    q = torch.randn(new, point.q_heads, point.head_dim, generator=torch.Generator().manual_seed(1))
    return q.to(torch.bfloat16), content.k, content.v


def _print(rows: list[report.Row], machine: Machine) -> None:
    title = (
        f"attention, {machine['threads']} threads, {machine['isa']}, plain read {machine['read_gbps']:.1f} GB/s "
        f"({machine['read_gbps_one_thread']:.1f} with one)"
    )
    for phase, columns in COLUMNS.items():
        shown = [
            {**row, "kv": SHORT.get(row["kv_dtype"], row["kv_dtype"]), "shape": f"{row['batch']}x{row['context']}"}
            for row in rows
            if row["phase"] == phase
        ]
        if shown:
            report.print_table(f"{title}: {phase}" if phase == "decode" else phase, shown, columns)
