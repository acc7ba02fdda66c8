"""Slices with packed weights and compiled slices give what plain ones give."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lamina.model import products
from lamina.model.functions import compile_trouble
from lamina.model.slices import SlicedModel
from lamina.model.weights import load_weights
from tests.families import FAMILIES
from tests.model.compose import CPU, compose, cut_checkpoint
from tests.model.test_families import prompt, relative_error, whole

LENGTHS = (1, 2, 6, 7, 16, 17, 60, 300)
"""Tokens of a step, around every place where products change their ways."""

DEFAULT = {("mixtral", "bfloat16")}
"""What is compiled by default; with an empty cache that takes half a minute each."""


def load(cut, *, compiled):
    return SlicedModel(cut, load_weights(cut.capture, cut.weights_of(), CPU), CPU, compiled=compiled)


def logits_of(model, tokens):
    return compose(model, [tokens], torch.arange(min(len(tokens), 3)))[0].float()


def compiled_functions():
    """How many functions Inductor has found in its cache, and how many it has compiled."""
    counters = torch._dynamo.utils.counters["inductor"]
    return counters["fxgraph_cache_hit"], counters["fxgraph_cache_miss"]


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("lamina") and r.levelno >= logging.WARNING]


needs_packing = pytest.mark.skipif(
    not products.can_pack(torch.bfloat16), reason="this processor has no instructions for bfloat16"
)


def multiply(x, packed, bias, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return torch.ops.lamina.product(x, packed, bias)
    finally:
        torch.set_num_threads(before)


@needs_packing
@given(
    rows=st.integers(1, 300),
    outputs=st.integers(1, 200),
    inputs=st.integers(1, 1200),
    bias=st.booleans(),
    threads=st.sampled_from((1, 3)),
)
@settings(max_examples=60, deadline=None)
@example(rows=1, outputs=64, inputs=1, bias=False, threads=1)
@example(rows=7, outputs=33, inputs=1025, bias=True, threads=3)
@example(rows=12, outputs=130, inputs=1024, bias=False, threads=1)
@example(rows=13, outputs=65, inputs=1026, bias=True, threads=1)
@example(rows=129, outputs=50, inputs=1090, bias=False, threads=3)
def test_packed_product_is_the_product(rows, outputs, inputs, bias, threads):
    """Any number of rows; outputs and inputs that fill no panel, no chunk and no pair; one thread or three."""
    generator = torch.Generator().manual_seed(rows)
    weight = (torch.randn(outputs, inputs, generator=generator) * inputs**-0.5).bfloat16()
    added = torch.randn(outputs, generator=generator).bfloat16() if bias else None
    x = torch.randn(1, rows, inputs, generator=generator).bfloat16()

    got = multiply(x, products.pack(weight), added, threads)

    want = torch.nn.functional.linear(x.double(), weight.double(), None if added is None else added.double())
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-5)


@needs_packing
@pytest.mark.parametrize("inputs", [1090, 33])
def test_packed_product_is_the_same_for_any_batch_mates(inputs):
    """A row's numbers are the same to the bit however many rows are beside it, and however many threads there are."""
    packed = products.pack(torch.randn(200, inputs).bfloat16())
    if packed.panels is None or packed.panels.max_rows < 400:
        pytest.skip("oneDNN multiplies on this processor, at least with many rows")
    x = torch.randn(400, inputs).bfloat16()

    alone = torch.cat([multiply(row[None], packed, None, 1) for row in x])

    for rows in (*range(1, 40), 64, 127, 128, 129, 257, 400):
        for threads in (1, 2, 5):
            assert alone[:rows].equal(multiply(x[:rows], packed, None, threads)), (rows, threads)
    assert alone[-7:].equal(multiply(x[-7:], packed, None, 1))


@needs_packing
def test_without_the_kernel_onednn_multiplies():
    """Where the processor lacks the instructions, here hidden from torch, the results are as exact."""
    code = """
import torch
from lamina.model import products
for outputs, inputs in ((130, 1090), (50, 33)):
    weight = (torch.randn(outputs, inputs) * inputs**-0.5).bfloat16()
    packed = products.pack(weight)
    assert packed.panels is None
    for rows in (1, 17, 100):
        x = torch.randn(rows, inputs).bfloat16()
        want = x.double() @ weight.double().T
        torch.testing.assert_close(torch.ops.lamina.product(x, packed, None).double(), want, rtol=2**-7, atol=1e-2)
"""
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(family, dtype, marks=() if (family, dtype) in DEFAULT else pytest.mark.slow)
        for family in FAMILIES
        for dtype in ("bfloat16", "float32")
    ],
)
def test_compiled_slices_give_what_plain_ones_give(family, dtype, saved, original, caplog):
    """In every family, for any number of tokens, and without compiling anew for another number."""
    cut = cut_checkpoint(saved(family), dtype)
    plain, compiled = load(cut, compiled=False), load(cut, compiled=True)
    before = compiled_functions()
    assert not warnings_of(caplog)

    for length in LENGTHS:
        tokens = prompt(length)
        got, want = logits_of(compiled, tokens), logits_of(plain, tokens)
        if dtype == "float32":
            assert relative_error(got, want) < 1e-5
        else:
            exact = whole(original(family), tokens)[: len(got)]
            assert relative_error(got, exact) < 2 * relative_error(want, exact) + 0.01
    assert compiled_functions() == before


def test_compile_time_does_not_grow_with_the_layers(saved, tmp_path, caplog):
    """A model of more layers has as many functions to compile."""
    caplog.set_level(logging.INFO, "lamina.model")
    deeper = FAMILIES["llama"].save(tmp_path, dtype="bfloat16", num_hidden_layers=6)
    compiled = []
    for path in (saved("llama"), deeper):
        caplog.clear()
        load(cut_checkpoint(path, "bfloat16"), compiled=True)
        compiled.append([r.getMessage() for r in caplog.records if "event=compiling" in r.getMessage()])

    assert len(compiled[0]) == len(compiled[1]) == 5
    assert compiled[0][2] == "event=compiling part=3 of=5 name='tail of slice 0'"


def test_a_second_start_compiles_nothing(saved):
    """What has been compiled once is found in the user's cache."""
    load(cut_checkpoint(saved("llama"), "bfloat16"), compiled=True)
    hits, misses = compiled_functions()

    load(cut_checkpoint(saved("llama"), "bfloat16"), compiled=True)

    assert compiled_functions() == (hits + 5, misses)


def test_without_a_compiler_slices_run_uncompiled(saved, caplog):
    """Every part is named with the reason, and gives what it should."""
    cut = cut_checkpoint(saved("llama"), "bfloat16")
    plain = load(cut, compiled=False)

    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/c++",)}):
        model = load(cut, compiled=True)

    assert logits_of(model, prompt(20)).equal(logits_of(plain, prompt(20)))
    warnings = warnings_of(caplog)
    assert len(warnings) == 5
    assert "event=not_compiled part='head of slice 1'" in warnings[3]
    assert "/nowhere/c++" in warnings[3] or "compiler" in warnings[3].lower()


def test_a_compiler_without_headers_is_no_compiler(tmp_path):
    """As on systems that have Python without what programs in C++ need of it."""
    assert compile_trouble() == ""
    compiler = tmp_path / "g++"
    compiler.write_text(
        """#!/bin/sh
[ "$1" = --version ] && exit 0
echo "<stdin>:1:10: fatal error: Python.h: No such file or directory" >&2
exit 1
"""
    )
    compiler.chmod(0o755)

    with torch._inductor.config.patch({"cpp.cxx": (None, str(compiler))}):
        trouble = compile_trouble()

    assert trouble == (
        f"{compiler} fails (<stdin>:1:10: fatal error: Python.h: No such file or directory); install the headers of "
        "Python (python3-dev) and of OpenMP"
    )


def test_weights_are_handed_over(blueprint):
    """Nothing keeps the weights as they were loaded beside what they were packed into."""
    cut = blueprint("llama_tied")
    weights = load_weights(cut.capture, cut.weights_of(), CPU)

    SlicedModel(cut, weights, CPU)

    assert not weights
