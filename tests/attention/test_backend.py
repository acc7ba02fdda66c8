"""What every backend promises of attention, on every path and for every type stored.

A new backend joins by a target in backends.py. See test_stored.py for what it promises of keys and values.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.attention import (
    Backend,
    KVLayout,
    LayerShape,
    Memory,
    Partial,
    Rows,
    Run,
    attend,
    create_backend,
    merge,
)
from lamina.attention.backend import require_backend
from lamina.attention.torch_backend import TorchBackend, TorchPlan
from lamina.errors import CapacityError, ConfigError, LaminaError, UsageError
from tests.attention.backends import Target, every_target, every_type, examples
from tests.attention.oracle import TOLERANCE, assert_close, assert_same_bits, dequantised, exact_rows, join
from tests.attention.readback import read
from tests.attention.steps import Step, layer_shapes, steps

PLAIN = LayerShape(q_heads=6, kv_heads=2, qk_dim=64, v_dim=64, scale=0.125)
SLIDING = replace(PLAIN, window=7)


def any_type(target: Target) -> str:
    """The most exact type that a target stores."""
    return target.dtypes[0]


# -- one step against float64


def check_step(target: Target, step: Step) -> None:
    with step.prepared(target) as backend:
        plan = backend.plan(step.rows)
        assert plan.rows == step.rows

        for layer in step.layers:
            past, whole = step.run(backend, plan, layer)

            contexts = step.stored(backend, layer)
            tolerance = target.tolerance(step.layout.dtype, step.layout.layers[layer].v_dim)
            assert_close(past, step.expected(layer, contexts, past_only=True), tolerance)
            assert_close(whole, step.expected(layer, contexts), tolerance)
            assert all(backend.cache.filled(run.sequence, layer) == run.stop for run in step.rows.runs)

            past_again, whole_again = step.run(backend, plan, layer)
            assert_same_bits(past_again, past)
            assert_same_bits(whole_again, whole)


@every_type
@settings(max_examples=examples(14), deadline=None)
@given(data=st.data())
def test_a_step_is_the_exact_attention(target: Target, dtype: str, data: st.DataObject) -> None:
    """`past` covers what was there, `finish` everything; unwritten memory does not show; a replay gives the same."""
    check_step(target, data.draw(steps(target, dtype)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@every_type
@settings(max_examples=examples(150), deadline=None)
@given(data=st.data())
def test_many_steps_are_the_exact_attention(target: Target, dtype: str, data: st.DataObject) -> None:
    """The same, for many more shapes, and for long contexts and chunks."""
    check_step(target, data.draw(steps(target, dtype, work=3e8)))


@every_type
def test_rounding_costs_what_it_should(target: Target, dtype: str) -> None:
    """Compared with k and v as they were given, 8 bits cost what is promised in every single row."""
    limit = {"int8": 2e-2, "float8_e4m3fn": 8e-2}.get(dtype, 1e-2)
    shapes = (replace(PLAIN, q_heads=8), replace(PLAIN, qk_dim=128, v_dim=128, scale=128**-0.5))
    step = Step(KVLayout(layers=shapes, dtype=dtype), (600, 77, 1000), (1, 5, 1), device=target.device)
    with step.prepared(target) as backend:
        plan = backend.plan(step.rows)
        for layer in step.layers:
            _, whole = step.run(backend, plan, layer)
            inputs = step.inputs(layer)
            assert_close(whole, step.expected(layer, list(zip(inputs.k, inputs.v, strict=True))), limit)


@every_target
@pytest.mark.parametrize("group", [1, 2, 5, 12, 16, 32, 64, 71, 128])
def test_many_query_heads_may_share_a_key_value_head(target: Target, group: int) -> None:
    """Multi-query attention too, with as many heads as models have."""
    shape = replace(PLAIN, q_heads=group, kv_heads=1)
    check_step(target, Step(KVLayout(layers=(shape,), dtype="bfloat16"), (70, 3), (1, 9), device=target.device))


@every_target
@pytest.mark.parametrize("size", [10.0, 100.0])
def test_huge_scores_neither_overflow_nor_vanish(target: Target, size: float) -> None:
    """Scores far beyond what exp can represent leave the best key's value alone, whichever shard it is in."""
    layout = KVLayout(layers=(replace(PLAIN, scale=1.0),), dtype=any_type(target))
    step = Step(layout, (100, 20), (1, 30), device=target.device)
    with step.prepared(target) as backend:
        q, k, v = step.inputs(0)
        for run in step.rows.runs:
            rows = Rows((Run(run.sequence, 0, run.start),))
            backend.append(0, rows, size * k[run.sequence][: run.start], v[run.sequence][: run.start])
        plan = backend.plan(step.rows)
        whole = backend.finish(plan, 0, size * q, size * step.new(k), step.new(v), backend.past(plan, 0, size * q))
        contexts = step.stored(backend, 0)
    parts = [
        exact_rows(size * rows, run.start, *context, range(run.stop), layout.layers[0])
        for run, rows, context in zip(step.rows.runs, q.split(step.counts), contexts, strict=True)
    ]
    assert whole.o.isfinite().all()
    error = (whole.o.cpu().double() - join(parts).o).norm(dim=-1) / join(parts).o.norm(dim=-1)
    # Where two keys are closer than the rounding of q makes them differ, either may be right: few rows, none other.
    clear = torch.cat(
        [
            _gaps(size * rows, k, run.start) > 2**-8 * size * rows.double().norm(dim=-1) * k.norm(dim=-1).max()
            for run, rows, (k, _) in zip(step.rows.runs, q.cpu().split(step.counts), contexts, strict=True)
        ]
    )
    assert clear.double().mean() > 0.7
    assert error[clear].max() < 1e-3


def _gaps(q: torch.Tensor, k: torch.Tensor, start: int) -> torch.Tensor:
    """How far the best visible key is before the second, of q [T, Hq, D] from ``start`` on and k [K, Hkv, D]."""
    scores = torch.einsum("qhd,khd->qhk", q.double(), k.repeat_interleave(q.shape[1] // k.shape[1], 1))
    visible = torch.arange(len(k)) <= start + torch.arange(len(q))[:, None]
    best = scores.masked_fill(~visible[:, None], -torch.inf).topk(2).values
    return best[..., 0] - best[..., 1]


@every_type
def test_equal_scores_give_the_mean(target: Target, dtype: str) -> None:
    """Queries of zeros see all of their keys alike; keys and values of zeros do no harm."""
    step = Step(KVLayout(layers=(PLAIN, SLIDING), dtype=dtype), (37, 0, 16), (1, 3, 1), device=target.device)
    with step.prepared(target) as backend:
        plan = backend.plan(step.rows)
        for layer, shape in enumerate(step.layout.layers):
            q, k, v = step.inputs(layer)
            k_new, v_new = step.new(k), step.new(v)
            k_new[-1], v_new[-1] = 0, 0
            q = torch.zeros_like(q)
            whole = backend.finish(plan, layer, q, k_new, v_new, backend.past(plan, layer, q))
            parts = [
                exact_rows(q[:count], run.start, *context, range(run.stop), shape)
                for run, count, context in zip(step.rows.runs, step.counts, step.stored(backend, layer), strict=True)
            ]
            assert_close(whole, join(parts), TOLERANCE[dtype])


# -- steps one after the other, and beside each other


@every_type
def test_prefill_in_chunks_and_decode_are_one_attention(target: Target, dtype: str) -> None:
    """A sequence that grows by 1, 30, 1, 1, 5, 60 and 1 tokens gets what one attention over all its tokens gives."""
    layout = KVLayout(layers=(PLAIN, SLIDING), dtype=dtype)
    counts = (1, 30, 1, 1, 5, 60, 1)
    tokens = sum(counts)
    whole = Step(layout, (0,), (tokens,), device=target.device)
    with target.open(layout, tokens) as backend:
        backend.cache.reserve(0, tokens)
        parts: list[list[Partial]] = [[], []]
        contexts = [
            (torch.zeros(tokens, 2, 64, dtype=torch.float64), torch.zeros(tokens, 2, 64, dtype=torch.float64))
            for _ in layout.layers
        ]
        start = 0
        for count in counts:
            plan = backend.plan(Rows((Run(0, start, count),)))
            part = Step(layout, (start,), (count,), device=target.device)
            for layer in whole.layers:
                q, (k,), (v,) = whole.inputs(layer)
                q, k, v = (one[start : start + count] for one in (q, k, v))
                parts[layer].append(backend.finish(plan, layer, q, k, v, backend.past(plan, layer, q)))
                for kept, now in zip(contexts[layer], part.stored(backend, layer)[0], strict=True):
                    kept[start : start + count] = now[start:]
            start += count

    for layer in whole.layers:
        assert_close(join(parts[layer]), whole.expected(layer, [contexts[layer]]), TOLERANCE[dtype])


@every_target
def test_two_steps_may_be_in_flight(target: Target) -> None:
    """Plans of different sequences live side by side, and one's results are not the other's memory."""
    layout = KVLayout(layers=(PLAIN, SLIDING), dtype=any_type(target))
    both = Step(layout, (50, 20, 300, 4), (1, 3, 1, 1), device=target.device)
    with both.prepared(target) as backend:
        runs = both.rows.runs
        plans = [backend.plan(Rows(runs[:2])), backend.plan(Rows(runs[2:]))]
        results: list[list[Partial]] = []
        for layer in both.layers:
            q, k, v = both.inputs(layer)
            cut = sum(both.counts[:2])
            (q, k_new, v_new) = (one.split([cut, len(q) - cut]) for one in (q, both.new(k), both.new(v)))
            pasts = [backend.past(plan, layer, rows) for plan, rows in zip(plans, q, strict=True)]
            results.append([backend.finish(plans[i], layer, q[i], k_new[i], v_new[i], pasts[i]) for i in (1, 0)])
        for layer in both.layers:
            expected = both.expected(layer, both.stored(backend, layer))
            assert_close(join(results[layer][::-1]), expected, TOLERANCE[layout.dtype])


@every_target
def test_an_old_step_comes_again(target: Target) -> None:
    """A step replayed after later ones gives its own bits again: it sees nothing that came after it."""
    layout = KVLayout(layers=(PLAIN,), dtype=any_type(target))
    whole = Step(layout, (40,), (8,), device=target.device)
    q, k, v = whole.inputs(0)

    def step(backend: Backend, position: int) -> Partial:
        plan = backend.plan(Rows((Run(0, position, 2),)))
        row = slice(position - 40, position - 38)
        past = backend.past(plan, 0, q[row])
        return backend.finish(plan, 0, q[row], whole.new(k)[row], whole.new(v)[row], past)

    with whole.prepared(target) as backend:
        first = [step(backend, position) for position in (40, 42, 44, 46)]
        assert_same_bits(step(backend, 42), first[1])
        assert backend.cache.filled(0, 0) == 48
        assert_same_bits(step(backend, 46), first[3])


@every_target
def test_windows_let_long_sequences_live_in_little_memory(target: Target) -> None:
    """A sequence of 2,000 tokens slides through a few blocks; what was freed is poisoned and never read."""
    dtype, tokens = any_type(target), 2000
    layout = KVLayout(layers=(replace(SLIDING, window=20), replace(SLIDING, window=50)), dtype=dtype)
    whole = Step(layout, (0,), (tokens,), q_dtype=dtype, kv_dtype=dtype, device=target.device)
    inputs = [whole.inputs(layer) for layer in whole.layers]
    counts = random.Random(0)
    with target.open(layout, 200) as backend:
        assert backend.cache.capacity_tokens < tokens / 3
        backend.cache.reserve(0, tokens, ahead=30)
        start = 0
        while start < tokens:
            run = Run(0, start, min(counts.choice([1, 1, 30, 7, 16]), tokens - start))
            poison_what_goes(backend, run)
            plan = backend.plan(Rows((run,)))
            for layer, (q, (k,), (v,)) in enumerate(inputs):
                q_new, k_new, v_new = (one[start : run.stop] for one in (q, k, v))
                out = backend.finish(plan, layer, q_new, k_new, v_new, backend.past(plan, layer, q_new))
                expected = exact_rows(q_new, start, k, v, range(run.stop), layout.layers[layer])
                assert_close(out, expected, TOLERANCE[dtype])
            start = run.stop


def poison_what_goes(backend: Backend, run: Run) -> None:
    """Place a run, and fill with NaN the blocks that its sequence frees and does not take again."""
    cache = backend.cache
    if not run.start:
        return
    before = cache.place(Rows((Run(run.sequence, run.start - 1, 1),)))
    tables = [before.tables(group)[0].copy() for group in range(len(cache.groups))]
    after = cache.place(Rows((run,)))
    gone = torch.zeros(cache.memory.nbytes, dtype=torch.bool)
    for group, (old, size) in enumerate(zip(tables, cache.block_bytes, strict=True)):
        for offset in old[(old >= 0) & (after.tables(group)[0] < 0)].tolist():
            gone[offset : offset + size] = True
    for group, size in enumerate(cache.block_bytes):
        table = after.tables(group)[0]
        for offset in table[table >= 0].tolist():
            gone[offset : offset + size] = False
    cache.memory.tensor[gone.to(cache.memory.device)] = 0xFF


# -- shards


@every_target
@settings(max_examples=examples(40), deadline=None)
@given(data=st.data())
def test_any_split_of_a_context_merges_to_the_whole(target: Target, data: st.DataObject) -> None:
    """Token ranges in several sequences' caches, some empty, merged in any order: sinks count once, and only the owner
    of the newest tokens gets k and v. Windows and slopes reach into older ranges through `attend`."""
    dtype = data.draw(st.sampled_from(target.dtypes))
    # The newest range numbers its positions from 0, which chunks do not allow.
    shape = replace(data.draw(layer_shapes(target)), chunk=None)
    layout = KVLayout(layers=(shape,), dtype=dtype, block_tokens=data.draw(st.sampled_from(target.block_tokens)))
    past = data.draw(st.integers(0, 90) | st.integers(0, 400))
    count = data.draw(st.sampled_from([1, 1, 2, 17]))
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, past), max_size=4))), past]
    shards = list(pairwise(cuts))
    newest = len(shards) - 1
    whole = Step(layout, (past,), (count,), seed=data.draw(st.integers(0, 99)), device=target.device)
    q, (k,), (v,) = whole.inputs(0)

    with target.open(layout, past + len(shards) * (count + layout.block_tokens)) as backend:
        partials, stored = [], []
        for sequence, (low, high) in enumerate(shards):
            length = high - low
            backend.cache.reserve(sequence, length + count)
            if length:
                backend.append(0, Rows((Run(sequence, 0, length),)), k[low:high], v[low:high])
                stored.append(dequantised(read(backend, sequence, 0, 0, length)))
            if sequence == newest or not shape.knows_positions:
                plan = backend.plan(Rows((Run(sequence, length, count),)))
                partials.append(backend.past(plan, 0, q))
            elif length:  # a cache that ends earlier cannot say how far away its positions are
                old_k, old_v = (one.float().to(q.device) for one in stored[-1])
                partials.append(attend(q, old_k, old_v, shape=shape, q_start=past, k_start=low))
        random.Random(past).shuffle(partials)
        done = backend.finish(plan, 0, q, k[past:], v[past:], merge(*partials))
        nothing = Partial.empty(count, shape.q_heads, shape.v_dim, device=q.device)
        apart = merge(backend.finish(plan, 0, q, k[past:], v[past:], nothing), *partials)
        stored.append(dequantised(read(backend, newest, 0, length, length + count)))

    expected = whole.expected(0, [(torch.cat([k for k, _ in stored]), torch.cat([v for _, v in stored]))])
    assert_close(done, expected, target.tolerance(dtype, shape.v_dim))
    assert_close(apart, expected, target.tolerance(dtype, shape.v_dim))


# -- batches and threads


@every_type
def test_batch_mates_do_not_change_a_sequence(target: Target, dtype: str) -> None:
    """A sequence whose keys or values are NaN spoils no other output, though it shares the batch."""
    step = Step(KVLayout(layers=(PLAIN,), dtype=dtype), (5, 40, 40, 0, 300), (1, 1, 7, 1, 1), device=target.device)
    healthy = [0, *range(2, 11)]
    with step.prepared(target) as backend:
        q, k, v = step.inputs(0)
        for sick in (v[1], k[1]):
            sick.fill_(torch.nan)
            backend.append(0, Rows((Run(1, 0, 40),)), k[1][:40], v[1][:40])
            plan = backend.plan(step.rows)
            whole = backend.finish(plan, 0, q, step.new(k), step.new(v), backend.past(plan, 0, q))
            expected = step.expected(0, step.stored(backend, 0))
            assert_close(
                Partial(whole.o[healthy], whole.lse[healthy]),
                Partial(expected.o[healthy], expected.lse[healthy]),
                TOLERANCE[dtype],
            )
            assert whole.o[1].isnan().all()


LONG_AND_SHORT = (3000, *((101 * i) % 120 for i in range(30)))


@every_type
def test_threads_and_runs_do_not_show(target: Target, dtype: str) -> None:
    """One long and many short sequences: for a number of threads every run gives the same bits, and each is exact."""
    layout = KVLayout(layers=(replace(PLAIN, softcap=30.0), replace(PLAIN, window=1500)), dtype=dtype)
    counts = tuple(40 if i == 7 else 1 for i in range(len(LONG_AND_SHORT)))
    expected: list[Partial] = []
    for threads in (1, 2, 3):
        step = Step(layout, LONG_AND_SHORT, counts, threads=threads, device=target.device)
        runs = []
        for _ in range(2):
            with step.prepared(target) as backend:
                plan = backend.plan(step.rows)
                runs.append([step.run(backend, plan, layer)[1] for layer in step.layers])
                if not expected:
                    expected = [step.expected(layer, step.stored(backend, layer)) for layer in step.layers]
        for once, again, exact in zip(*runs, expected, strict=True):
            assert_same_bits(once, again)
            assert_close(once, exact, TOLERANCE[dtype])


# -- what is refused


@every_target
def test_the_past_has_to_be_there(target: Target) -> None:
    """Attending to positions that no append has brought is an error in the layer that lacks them."""
    layout = KVLayout(layers=(PLAIN, PLAIN), dtype=any_type(target))
    step = Step(layout, (2,), (1,), device=target.device)
    q, (k,), (v,) = step.inputs(0)
    with target.open(layout, 3) as backend:
        backend.cache.reserve(0, 3)
        backend.append(0, Rows((Run(0, 0, 2),)), k[:2], v[:2])
        plan = backend.plan(step.rows)

        backend.past(plan, 0, q)
        with pytest.raises(UsageError, match=r"sequence 0, layer 1: position 2 comes after 0 stored"):
            backend.past(plan, 1, q)
        with pytest.raises(UsageError, match=r"sequence 0, layer 1: position 2 comes after 0 stored"):
            backend.append(1, step.rows, k[2:], v[2:])
        assert backend.cache.filled(0, 1) == 0


@every_target
def test_a_plan_does_not_outlive_its_sequences(target: Target) -> None:
    """When a sequence has been released, its blocks may be another's: the plan is refused."""
    step = Step(KVLayout(layers=(PLAIN,), dtype=any_type(target)), (3,), (1,), device=target.device)
    with step.prepared(target) as backend:
        plan = backend.plan(step.rows)
        q, k, v = step.inputs(0)
        past = backend.past(plan, 0, q)
        backend.cache.release(0)
        backend.cache.reserve(0, 4)

        with pytest.raises(UsageError, match="released"):
            backend.past(plan, 0, q)
        with pytest.raises(UsageError, match="released"):
            backend.finish(plan, 0, q, step.new(k), step.new(v), past)
        assert backend.cache.filled(0, 0) == 0


@every_target
def test_a_plan_does_not_outlive_what_its_windows_reach(target: Target) -> None:
    """When a later step has let blocks go that the window of an earlier one reaches, the earlier plan is refused where
    there is a window, nothing is stored, and the later plan is as good as ever; where there is none, both are."""
    layout = KVLayout(layers=(replace(PLAIN, window=16), PLAIN), dtype=any_type(target))
    whole = Step(layout, (0,), (201,), device=target.device)
    with target.open(layout, 201) as backend:
        backend.cache.reserve(0, 201)
        inputs = [(q, k, v) for q, (k,), (v,) in (whole.inputs(layer) for layer in whole.layers)]
        for layer, (_, k, v) in enumerate(inputs):
            backend.append(layer, Rows((Run(0, 0, 100),)), k[:100], v[:100])
        early = backend.plan(Rows((Run(0, 100, 1),)))
        pasts = [backend.past(early, layer, q[100:101]) for layer, (q, _, _) in enumerate(inputs)]
        for layer, (_, k, v) in enumerate(inputs):
            backend.append(layer, Rows((Run(0, 100, 100),)), k[100:200], v[100:200])
        late = backend.plan(Rows((Run(0, 200, 1),)))
        before = [read(backend, 0, 0, 190, 200), read(backend, 0, 1, 0, 200)]

        q, k, v = (one[100:101] for one in inputs[0])
        with pytest.raises(
            UsageError, match=r"sequence 0, layer 0: positions before \d+ were freed after the step at 100"
        ):
            backend.past(early, 0, q)
        with pytest.raises(
            UsageError, match=r"sequence 0, layer 0: positions before \d+ were freed after the step at 100"
        ):
            backend.finish(early, 0, q, k, v, pasts[0])
        assert_same_bits(backend.past(early, 1, inputs[1][0][100:101]), pasts[1])
        for old, new in zip(before, [read(backend, 0, 0, 190, 200), read(backend, 0, 1, 0, 200)], strict=True):
            assert torch.equal(old.k.view(torch.uint8), new.k.view(torch.uint8))
            assert torch.equal(old.v.view(torch.uint8), new.v.view(torch.uint8))
        for layer, (q, k, v) in enumerate(inputs):
            row = slice(200, 201)
            out = backend.finish(late, layer, q[row], k[row], v[row], backend.past(late, layer, q[row]))
            ((k, v),) = Step(layout, (200,), (1,)).stored(backend, layer)
            expected = exact_rows(q[row], 200, k, v, range(201), layout.layers[layer])
            assert_close(out, expected, target.tolerance(layout.dtype, 64))


@every_target
def test_what_windows_have_left_behind_may_be_appended_again(target: Target) -> None:
    """Nothing can see it any more: it is skipped, and what is still there stays as it is."""
    layout = KVLayout(layers=(replace(PLAIN, window=16),), dtype=any_type(target))
    whole = Step(layout, (0,), (200,), device=target.device)
    _, (k,), (v,) = whole.inputs(0)
    with target.open(layout, 201) as backend:
        backend.cache.reserve(0, 201)
        backend.append(0, Rows((Run(0, 0, 200),)), k, v)
        backend.plan(Rows((Run(0, 200, 1),)))
        before = read(backend, 0, 0, 185, 200)

        backend.append(0, Rows((Run(0, 20, 30),)), k[60:90], v[60:90])

        after = read(backend, 0, 0, 185, 200)
        assert torch.equal(before.k.view(torch.uint8), after.k.view(torch.uint8))
        assert torch.equal(before.v.view(torch.uint8), after.v.view(torch.uint8))
        assert backend.cache.filled(0, 0) == 200


@every_target
def test_a_step_stays_within_reservations(target: Target) -> None:
    """Planned or appended, rows beyond a reservation are refused, and nothing is stored."""
    step = Step(KVLayout(layers=(PLAIN,), dtype=any_type(target)), (0,), (4,), device=target.device)
    _, (k,), (v,) = step.inputs(0)
    with target.open(step.layout, 3) as backend:
        backend.cache.reserve(0, 3)

        with pytest.raises(CapacityError, match=r"sequence 0 .* 3 tokens, position 3 needs 4"):
            backend.plan(step.rows)
        with pytest.raises(CapacityError, match=r"sequence 0 .* 3 tokens, position 3 needs 4"):
            backend.append(0, step.rows, k, v)
        assert backend.cache.filled(0, 0) == 0


@every_target
@pytest.mark.parametrize("wrong", ["q", "k", "v", "tokens", "o", "lse", "type", "device"])
def test_tensors_of_the_wrong_shape_are_refused(target: Target, wrong: str) -> None:
    """Before anything is stored, and before anything outside the tensors could be read."""
    step = Step(KVLayout(layers=(PLAIN,), dtype=any_type(target)), (3,), (2,), device=target.device)
    with step.prepared(target) as backend:
        plan = backend.plan(step.rows)
        q, (k,), (v,) = step.inputs(0)
        k, v = k[3:], v[3:]
        o, lse = backend.past(plan, 0, q)
        if wrong == "q":
            q = q[:, :-1]
        elif wrong == "k":
            k = k[:, :1]
        elif wrong == "v":
            v = v[..., :63]
        elif wrong == "tokens":
            q, k, v, o, lse = (one[:1] for one in (q, k, v, o, lse))
        elif wrong == "o":
            o = o[:1]
        elif wrong == "lse":
            lse = lse[:, :1]
        elif wrong == "device":
            v = v.to("meta")
        else:
            k = k.to(torch.int32)

        with pytest.raises(LaminaError, match="expected"):
            backend.finish(plan, 0, q, k, v, Partial(o, lse))
        assert backend.cache.filled(0, 0) == 3


class Counting(TorchBackend):
    """The reference, with blocks twice as large, that counts its plans."""

    name = "counting"
    plans = 0

    @staticmethod
    def layer_bytes(shape: LayerShape, dtype: str, block_tokens: int) -> int:
        return 2 * TorchBackend.layer_bytes(shape, dtype, block_tokens)

    def plan(self, rows: Rows, *, store: bool = True) -> TorchPlan:
        self.plans += 1
        return super().plan(rows, store=store)


def test_a_caller_hands_in_its_own_backend() -> None:
    """A factory makes the backend, and says how large blocks are, with the arguments that a named one gets."""
    layout, memory = KVLayout(layers=(PLAIN,), dtype="float32"), Memory(1 << 20)
    named = create_backend("torch", layout, memory)

    backend = create_backend(Counting, layout, memory, threads=2, cpus=None)

    assert isinstance(backend, Counting)
    assert backend.cache.block_bytes == [2 * size for size in named.cache.block_bytes]
    backend.cache.reserve(0, 1)
    backend.plan(Rows((Run(0, 0, 1),)))
    assert backend.plans == 1
    assert require_backend(Counting) is Counting
    assert require_backend("torch") is TorchBackend


def test_an_unknown_backend_lists_the_known_ones() -> None:
    layout = KVLayout(layers=(PLAIN,), dtype="float32")

    with pytest.raises(ConfigError, match=r"one of native, flashinfer, torch, got 'tensorflow'"):
        create_backend("tensorflow", layout, Memory(1 << 20))
