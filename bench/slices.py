"""Slices on a compute node's CPU, beside their matrix products alone and beside the bandwidth of the machine's memory.

With few sequences a slice is bound by the bytes of its weights, with many by arithmetic. So each figure stands beside
three yardsticks with the same type and threads, measured within the same minute: a plain read before and after every
sample; the multiplications that the cores do from registers, just before; and the products of the slice alone, by
oneDNN from packed weights with one call for each weight, in turns with the slice.
Models have random weights, and enough layers that no byte is still cached when it is read again.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from lamina.attention.native.build import compiler
from lamina.bench import report
from lamina.bench.bandwidth import REPEATS, Bandwidth, OtherWork, cache_bytes, check_threads, in_turns
from lamina.errors import ConfigError
from lamina.model.capture import capture
from lamina.model.checkpoint import Checkpoint
from lamina.model.products import can_pack, pack
from lamina.model.slices import Blueprint, SlicedModel, cut_into_slices

DTYPE = torch.bfloat16
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 512)
QUICK_BATCHES = (1, 8, 32)

CACHES = 6
"""How many times the size of the last-level caches is read between two visits of a byte."""

COLUMNS = {
    "batch": "batch",
    "ms": "ms",
    "gflops": "GFLOP/s",
    "gbps": "GB/s",
    "read_gbps": "read",
    "read_ratio": "of read",
    "peak_ratio": "of peak",
    "products_ms": "products ms",
    "products_ratio": "x products",
}
"""The columns of the table of a model and a part; ``x products`` is the time of the products over that of the slice."""


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama."""

    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """The outputs and inputs of the products in a slice: o, gate, up, down, q, k, v."""
        q, kv, hidden, ffn = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden, self.ffn
        return (hidden, q), (ffn, hidden), (ffn, hidden), (hidden, ffn), (q, hidden), (kv, hidden), (kv, hidden)

    @property
    def projection(self) -> tuple[int, int]:
        """The outputs and inputs of the output projection."""
        return self.vocabulary, self.hidden

    def blueprint(self, layers: int) -> Blueprint:
        """Return the model cut into slices, without weights."""
        from transformers import LlamaConfig

        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
        )
        with tempfile.TemporaryDirectory(prefix="lamina-bench-") as folder:
            config.save_pretrained(folder)
            return cut_into_slices(capture(Checkpoint.open(Path(folder), str(DTYPE).removeprefix("torch."))))


SHAPES = (
    LlamaShape("M", hidden=2048, ffn=8192, heads=32, kv_heads=8, head_dim=64, vocabulary=32_000),
    LlamaShape("S", hidden=1024, ffn=3072, heads=16, kv_heads=4, head_dim=64, vocabulary=8192),
)


def run(*, threads: int | None, compiled: bool, as_json: bool, quick: bool) -> None:
    """Measure and print the results."""
    threads = check_threads(threads)
    if not can_pack(DTYPE):
        raise ConfigError("bench slices: this processor has no bfloat16 instructions, so no weights can be packed")
    console = Console(stderr=True)
    torch.set_num_threads(threads)
    others, bandwidth, peak = OtherWork(), Bandwidth(threads), _Peak(threads)
    shapes, batches = (SHAPES[:1], QUICK_BATCHES) if quick else (SHAPES, BATCHES)
    rows = []
    try:
        machine = {**report.machine(), "threads": threads, "compiled": compiled, "llc_bytes": cache_bytes()}
        machine |= {"read_gbps": bandwidth.all_threads(), "peak_gflops": peak.gflops()}
        with torch.inference_mode(), report.progress(console) as progress:
            task = progress.add_task("slices", total=2 * len(shapes) * len(batches))
            for shape in shapes:
                for work in (_Slices(shape, compiled=compiled), _Projection(shape)):
                    for batch in batches:
                        rows.append(_row(shape, work, batch, bandwidth, peak))
                        progress.advance(task)
    finally:
        bandwidth.close()
    machine["other_cores"] = others.mention(console)
    how = f"{threads} threads, bfloat16, {'compiled' if compiled else 'not compiled'}"
    if as_json:
        report.print_json(report.Result("slices", how, rows, machine))
    else:
        for model, part in dict.fromkeys((row["model"], row["part"]) for row in rows):
            shown = [row for row in rows if (row["model"], row["part"]) == (model, part)]
            report.print_table(f"{part} of model {model}, {how}", shown, COLUMNS)


Layered = Callable[[int], object]
"""Work on the copy with the given number."""


class _Peak:
    """The rate at which all cores together multiply numbers in registers."""

    ROUNDS = 1_000_000

    def __init__(self, threads: int) -> None:
        source = Path(__file__).parent / "yardsticks" / "multiply.cpp"
        with tempfile.TemporaryDirectory(prefix="lamina-bench-") as folder:
            library = str(Path(folder) / "multiply.so")
            subprocess.run([compiler(), "-O3", "-fPIC", "-shared", str(source), "-o", library], check=True)
            self._multiply = ctypes.CDLL(library).lamina_multiply
        self._multiply.restype, self._multiply.argtypes = ctypes.c_double, [ctypes.c_long]
        self._threads = threads

    def gflops(self) -> float:
        """Return the best of a few samples, as no disturbance makes a sample too high."""
        with ThreadPoolExecutor(self._threads) as pool:
            return max(self._sample(pool) for _ in range(REPEATS)) / 1e9

    def _sample(self, pool: ThreadPoolExecutor) -> float:
        started = time.perf_counter()
        operations: float = sum(pool.map(self._multiply, [self.ROUNDS] * self._threads))
        return operations / (time.perf_counter() - started)


class _Slices:
    """The middle slices of a model, run one after the other, each with its head and its tail."""

    part = "slice"

    def __init__(self, shape: LlamaShape, *, compiled: bool) -> None:
        self.numbers = sum(outputs * inputs for outputs, inputs in shape.products)
        self.copies = _copies(self.numbers)
        blueprint = shape.blueprint(self.copies + 1)
        used = blueprint.weights_of(0, self.copies)
        tensors = {
            **dict(blueprint.capture.module.named_parameters()),
            **dict(blueprint.capture.module.named_buffers()),
        }
        weights = {name: _random(*tensors[name].shape, dtype=tensors[name].dtype) for name in used}
        self._model = SlicedModel(blueprint, weights, torch.device("cpu"), 0, self.copies, compiled=compiled)
        self._heads = shape.heads, shape.head_dim
        self._products = _Products(shape.products, self.copies)

    def calls(self, batch: int) -> tuple[Layered, Layered]:
        """Return a function that runs a slice for ``batch`` tokens, and one that runs its products alone."""
        numbers = torch.arange(batch)
        constants = self._model.begin(numbers, numbers, numbers)
        first, *middle = self._model.slices
        carry = first.tail(constants, first.head(constants).kept).carry
        o = _random(batch, *self._heads)

        def work(i: int) -> object:
            piece = middle[i]
            return piece.tail(constants, piece.head(constants, carry, o).kept)

        return work, self._products.call(batch)


class _Projection:
    """The output projection alone, with several copies of its weight."""

    part = "projection"

    def __init__(self, shape: LlamaShape) -> None:
        outputs, inputs = shape.projection
        self.numbers = outputs * inputs
        self.copies = _copies(self.numbers)
        self._inputs = inputs
        self._weights = [pack(_random(outputs, inputs)) for _ in range(self.copies)]
        self._products = _Products([shape.projection], self.copies)

    def calls(self, batch: int) -> tuple[Layered, Layered]:
        """Return a function that projects ``batch`` rows with Lamina's kernel, and one that does so with oneDNN."""
        x, product = _random(batch, self._inputs), torch.ops.lamina.product.default
        return lambda i: product(x, self._weights[i], None), self._products.call(batch)


class _Products:
    """The yardstick: the products alone, by oneDNN from packed weights, with ``copies`` copies of each weight."""

    def __init__(self, shapes: Sequence[tuple[int, int]], copies: int) -> None:
        self._inputs = [inputs for _, inputs in shapes]
        self._weights = [[pack(_random(*shape)) for shape in shapes] for _ in range(copies)]

    def call(self, batch: int) -> Layered:
        product = torch.ops.mkldnn._linear_pointwise.default
        values = {inputs: _random(batch, inputs) for inputs in self._inputs}

        def work(i: int) -> object:
            for inputs, weight in zip(self._inputs, self._weights[i], strict=True):
                product(values[inputs], weight, None, "none", [], "")
            return None

        return work


def _copies(numbers: int) -> int:
    """Return how many weights of ``numbers`` numbers are together too large to stay in the caches."""
    return max(2, -(-CACHES * cache_bytes() // (numbers * DTYPE.itemsize)))


def _random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """Return small normally distributed numbers, which repeat because generating them all would take minutes."""
    count = torch.Size(shape).numel()
    some = (torch.randn(min(count, 1 << 20)) * 0.02).to(dtype)
    return some.repeat(-(-count // len(some)))[:count].view(shape)


def _row(shape: LlamaShape, work: _Slices | _Projection, batch: int, bandwidth: Bandwidth, peak: _Peak) -> report.Row:
    ours, products = work.calls(batch)
    peak_gflops = peak.gflops()
    nbytes = work.numbers * DTYPE.itemsize
    read = bandwidth.compare(ours, work.copies, nbytes, one=False, settle=True)
    seconds = in_turns({"ours": ours, "products": products}, work.copies)
    gflops = 2 * batch * work.numbers / seconds["ours"] / 1e9
    return {
        "model": shape.name,
        "part": work.part,
        "batch": batch,
        "ms": seconds["ours"] * 1e3,
        "gflops": gflops,
        "gbps": read.gbps,
        "read_gbps": read.read_gbps,
        "read_ratio": read.ratio,
        "peak_gflops": peak_gflops,
        "peak_ratio": gflops / peak_gflops,
        "products_ms": seconds["products"] * 1e3,
        "products_ratio": seconds["products"] / seconds["ours"],
    }
