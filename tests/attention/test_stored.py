"""What every backend promises of keys and values: how they are rounded, shared and kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lamina.attention import KVLayout, LayerShape, Rows, Run
from tests.attention.backends import TORCH, Target, every_target, every_type, examples
from tests.attention.oracle import (
    TOLERANCE,
    assert_close,
    assert_rounded,
    assert_same_numbers,
    dequantised,
    exact_rows,
)
from tests.attention.readback import Stored, read
from tests.attention.steps import Step, steps

PLAIN = LayerShape(q_heads=6, kv_heads=2, qk_dim=64, v_dim=64, scale=0.125)
INPUTS = ("float32", "bfloat16", "float16")


def assert_same_stored(actual: Stored, expected: Stored) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert_same_numbers(one.cpu(), other.cpu())


def unwindowed(step: Step) -> Step:
    """The same without what depends on positions, so that no position goes back."""
    layers = tuple(replace(shape, window=None, chunk=None, slopes=None) for shape in step.layout.layers)
    return replace(step, layout=replace(step.layout, layers=layers))


def store(target: Target, layout: KVLayout, k: Tensor, v: Tensor) -> Stored:
    """What a target makes of the positions of one sequence."""
    with target.open(layout, len(k)) as backend:
        backend.cache.reserve(0, len(k))
        backend.append(0, Rows((Run(0, 0, len(k)),)), k.to(target.device), v.to(target.device))
        return read(backend, 0, 0, 0, len(k))


@every_type
@settings(max_examples=examples(12), deadline=None)
@given(data=st.data())
def test_what_was_appended_comes_out_rounded(target: Target, dtype: str, data: st.DataObject) -> None:
    """In every layer, from inputs of every type and layout in memory, past and new tokens alike; any range of them."""
    step = unwindowed(data.draw(steps(target, dtype, work=4e6, longest=600)))
    with step.prepared(target) as backend:
        plan = backend.plan(step.rows)
        for layer in step.layers:
            step.run(backend, plan, layer)
            _, k, v = step.inputs(layer)
            for run in step.rows.runs:
                start = data.draw(st.integers(0, run.stop - 1))
                stop = data.draw(st.integers(start + 1, run.stop))
                stored = read(backend, run.sequence, layer, start, stop)
                for number, scale, given_ in (
                    (stored.k, stored.k_scale, k[run.sequence]),
                    (stored.v, stored.v_scale, v[run.sequence]),
                ):
                    assert number.dtype == getattr(torch, dtype)
                    scales = None if scale is None else scale.cpu()
                    assert_rounded(number.cpu(), scales, given_[start:stop].cpu())


def awkward(dtype: str, dim: int) -> Tensor:
    """Vectors [n, 2, dim] of numbers that are hard to round: ties, zeros of both signs, subnormal, huge, not finite."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.zeros(dim),
        torch.full((dim,), -0.0),
        torch.linspace(-1, 1, dim),
        torch.arange(dim) - dim / 2,
        (torch.arange(dim) % 254 - 127) / 2.0,  # ties of int8, with 127 the largest below
        torch.cat([torch.full((1,), 127.0), torch.arange(dim - 1) % 127 + 0.5]),
        torch.cat(
            [torch.full((1,), 448.0), (torch.arange(dim - 1) % 32 + 0.5) * 2**-9]
        ),  # fp8 subnormals and their ties
        torch.cat([torch.full((1,), 448.0), (torch.arange(dim - 1) % 32 + 16.5) * 0.5]),  # ties of fp8
        torch.cat([torch.full((1,), -448.0), torch.full((dim - 1,), 2**-10)]),
        (torch.arange(dim) + 0.5) * 2**-24,  # subnormals of float16 and their ties
        1 + (torch.arange(dim) + 0.5) * 2**-8,  # ties of bfloat16
        1 + (torch.arange(dim) + 0.5) * 2**-11,  # ties of float16
        torch.linspace(6.5e4, 6.6e4, dim),  # where float16 ends
        torch.full((dim,), 3.3e38),
        torch.full((dim,), 1e-29),
        torch.full((dim,), 1e-31),
        torch.cat([torch.full((1,), 1e30), torch.ones(dim - 1)]),
        torch.cat([torch.full((dim - 1,), 2.0), torch.full((1,), torch.nan)]),
        torch.cat([torch.full((1,), torch.nan), torch.full((dim - 1,), 2.0)]),
        torch.cat([torch.full((dim - 1,), 2.0), torch.full((1,), torch.inf)]),
        torch.cat([torch.full((1,), -torch.inf), torch.full((dim - 1,), 2.0)]),
    ]
    numbers = torch.stack([torch.stack([row, 3 * torch.randn(dim, generator=generator)]) for row in rows])
    return numbers.to(getattr(torch, dtype))


@every_type
@pytest.mark.parametrize("given_as", INPUTS)
@pytest.mark.parametrize("dim", [64, 40])
def test_awkward_numbers_are_rounded_to_the_same_bits_everywhere(
    target: Target, dtype: str, given_as: str, dim: int
) -> None:
    """What a backend stores of a number does not depend on the backend."""
    if dim not in target.dims:
        pytest.skip(f"{target} does not take heads of {dim}")
    layout = KVLayout(layers=(replace(PLAIN, qk_dim=dim, v_dim=dim),), dtype=dtype)
    k = awkward(given_as, dim)

    assert_same_stored(store(target, layout, k, k.flip(0)), store(TORCH, layout, k, k.flip(0)))


@every_type
def test_a_vector_that_is_not_finite_is_stored_as_such(target: Target, dtype: str) -> None:
    """NaN comes out as NaN, where there is a scale in the whole vector, and no other vector suffers."""
    layout = KVLayout(layers=(PLAIN,), dtype=dtype)
    k, v = torch.ones(20, 2, 64), torch.ones(20, 2, 64)
    k[3, 0, 5], v[17, 1, 63] = torch.nan, torch.nan

    stored = store(target, layout, k, v)

    if stored.k_scale is None or stored.v_scale is None:
        assert torch.equal(stored.k.isnan(), k.isnan())
        assert torch.equal(stored.v.isnan(), v.isnan())
    else:
        assert torch.equal(stored.k_scale.isnan(), k.isnan().any(-1))
        assert torch.equal(stored.v_scale.isnan(), v.isnan().any(-1))


@every_type
@settings(max_examples=examples(5), deadline=None)
@given(data=st.data())
def test_every_backend_stores_the_same_bits(target: Target, dtype: str, data: st.DataObject) -> None:
    """After a step, past and new tokens are the same numbers and scales in every layer as those of the reference."""
    step = unwindowed(data.draw(steps(target, dtype, work=4e6, longest=400)))

    def held(step: Step, target: Target) -> list[Stored]:
        with step.prepared(target) as backend:
            plan = backend.plan(step.rows)
            for layer in step.layers:
                step.run(backend, plan, layer)
            return [read(backend, run.sequence, layer, 0, run.stop) for layer in step.layers for run in step.rows.runs]

    for ours, reference in zip(held(step, target), held(replace(step, device="cpu"), TORCH), strict=True):
        assert_same_stored(ours, reference)


# -- sharing


def part(stored: Stored, rows: slice) -> Stored:
    return Stored(*(None if one is None else one[rows] for one in stored))  # type: ignore[arg-type]


@every_type
def test_a_published_block_is_never_overwritten(target: Target, dtype: str) -> None:
    """Neither by its first owner nor by who shares it: both attend to what is stored, whatever k and v they bring."""
    layout = KVLayout(layers=(PLAIN, replace(PLAIN, window=24)), dtype=dtype)
    size, tokens = layout.block_tokens, 56
    keys = [bytes([number]) * 16 for number in range(3)]
    first = Step(layout, (0,), (tokens,), device=target.device)
    other = replace(first, seed=1)
    with target.open(layout, 3 * tokens) as backend:
        backend.cache.reserve(0, tokens)
        for layer in first.layers:
            _, (k,), (v,) = first.inputs(layer)
            backend.append(layer, first.rows, k, v)
        held = [read(backend, 0, layer, 0, tokens) for layer in first.layers]
        backend.cache.publish(0, keys)
        assert backend.cache.reserve(1, tokens, keys=keys) == 3 * size

        for sequence in (0, 1):
            # From within the shared part on, as a front does that computes the last tokens of a prompt again.
            start = 3 * size - 5
            rows = Rows((Run(sequence, start, tokens - start),))
            plan = backend.plan(rows)
            for layer, shape in enumerate(layout.layers):
                q, (k,), (v,) = other.inputs(layer)
                k, v, q = k[start:], v[start:], q[start:]
                whole = backend.finish(plan, layer, q, k, v, backend.past(plan, layer, q))
                low = 0 if shape.window is None else start - shape.window + 1
                now = read(backend, sequence, layer, low, tokens)
                assert_same_stored(part(now, slice(0, 3 * size - low)), part(held[layer], slice(low, 3 * size)))
                assert_rounded(now.k[3 * size - low :], _rows(now.k_scale, 3 * size - low), k[5:].cpu())
                context_k, context_v = (torch.zeros(tokens, 2, 64, dtype=torch.float64) for _ in range(2))
                context_k[low:], context_v[low:] = dequantised(now)
                expected = exact_rows(q, start, context_k, context_v, range(tokens), shape)
                assert_close(whole, expected, TOLERANCE[dtype])
            for layer in first.layers:  # an append beside the plan
                _, (k,), (v,) = other.inputs(layer)
                backend.append(layer, Rows((Run(sequence, 0, tokens),)), k, v)
        for layer in first.layers:
            if layout.layers[layer].window is None:
                for sequence in (0, 1):
                    now = read(backend, sequence, layer, 0, 3 * size)
                    assert_same_stored(now, part(held[layer], slice(0, 3 * size)))


def _rows(scale: Tensor | None, start: int) -> Tensor | None:
    return None if scale is None else scale[start:]


@every_target
def test_what_was_freed_is_not_stored_again(target: Target) -> None:
    """Appends to positions behind a window are skipped: no row could see them, and their blocks may be others'."""
    layout = KVLayout(layers=(replace(PLAIN, window=10),), dtype=target.dtypes[0])
    step = Step(layout, (100,), (1,), chunk=20, tight=True, device=target.device)
    with step.prepared(target) as backend:
        backend.plan(step.rows)
        before = backend.cache.memory.tensor.clone()
        _, (k,), (v,) = step.inputs(0)

        backend.append(0, Rows((Run(0, 0, 80),)), k[:80], v[:80])

        assert torch.equal(backend.cache.memory.tensor, before)
        assert backend.cache.filled(0, 0) == 100
