from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lamina.attention import ExtentPool, KVCache, KVLayout, LayerShape, Memory, QuotaPool, Rows, Run
from lamina.attention.placement import BlockPlacement
from lamina.attention.pool import most_blocks
from lamina.errors import CapacityError, UsageError

FULL = LayerShape(q_heads=2, kv_heads=2, qk_dim=3, v_dim=1, scale=1.0)
WIDE = LayerShape(q_heads=1, kv_heads=1, qk_dim=40, v_dim=8, scale=1.0)
SLIDING = LayerShape(q_heads=1, kv_heads=1, qk_dim=1, v_dim=2, scale=1.0, window=6)
LAYERS = (FULL, SLIDING, FULL, WIDE, SLIDING)


def layout(block_tokens: int = 4, layers: tuple[LayerShape, ...] = LAYERS) -> KVLayout:
    return KVLayout(layers=layers, dtype="float32", block_tokens=block_tokens)


def layer_bytes(shape: LayerShape, dtype: str, block_tokens: int) -> int:
    """A cache line more for each dimension, so that groups have blocks of different sizes."""
    return 64 * (1 + shape.qk_dim // 16)


def make(blocks: int, *, block_tokens: int = 4, layers: tuple[LayerShape, ...] = LAYERS, extent: int = 256) -> KVCache:
    """A cache alone in a pool that holds so many blocks of each group, and not one more."""
    own = layout(block_tokens, layers)
    sizes = [sum(layer_bytes(own.layers[i], "", block_tokens) for i in group.layers) for group in own.groups]
    extents = sum(-(-blocks // (extent // size)) for size in sizes)
    return KVCache(own, ExtentPool(Memory(extents * extent), extent_bytes=extent), layer_bytes)


def keys(tokens: list[int], block_tokens: int = 4) -> list[bytes]:
    """What the whole blocks of a sequence hold: chained, so that equal keys mean equal tokens up to there."""
    stops = range(block_tokens, len(tokens) + 1, block_tokens)
    return [hashlib.blake2s(bytes(tokens[:stop]), digest_size=16).digest() for stop in stops]


def store(cache: KVCache, layer: int, *runs: Run) -> BlockPlacement:
    """What a backend does around storing."""
    placement = cache.place(Rows(runs), attend=False)
    cache.require_past(layer, placement)
    cache.advance(layer, placement)
    return placement


def table_of(cache: KVCache, sequence: int, layer: int) -> np.ndarray:
    """The block table of a sequence for a layer; nothing is assigned or freed by asking."""
    return cache.place(Rows((Run(sequence, 0, 1),)), attend=False, store=False).tables(cache.group_of(layer))[0]


def fill(cache: KVCache, sequence: int, start: int, stop: int) -> None:
    for layer in range(len(cache.layout.layers)):
        store(cache, layer, Run(sequence, start, stop - start))


@dataclass
class Held:
    """What the model knows of a sequence: its tokens say what every position holds."""

    tokens: list[int]
    apart: int | None
    filled: list[int] = field(default_factory=list)

    @property
    def ahead(self) -> int:
        return self.apart or len(self.tokens)


tenants = range(2)
sequences = range(4)


class CacheMachine(RuleBasedStateMachine):
    """Any use of two caches in ranges of one memory, beside a model that is a dictionary of what was stored where.

    A position holds the tokens of its sequence up to there, so that a block that two sequences own at once by
    mistake, or that is overwritten while it is shared, shows at once.
    """

    @initialize(
        block_tokens=st.integers(1, 4),
        extents=st.tuples(st.integers(3, 30), st.integers(3, 30)),
        extent=st.sampled_from([256, 320, 512]),
        layers=st.sampled_from([LAYERS, (FULL,), (SLIDING, FULL), (SLIDING,)]),
    )
    def start(self, block_tokens: int, extents: tuple[int, int], extent: int, layers: tuple[LayerShape, ...]) -> None:
        self.layout = layout(block_tokens, layers)
        self.memory = Memory(16384 + extents[1] * extent)
        quotas = QuotaPool(self.memory)
        ranges = [quotas.allocate(f"t{i}", count * extent) for i, count in enumerate(extents)]
        self.pools = [ExtentPool(own, extent_bytes=extent) for own in ranges]
        self.caches = [KVCache(self.layout, pool, layer_bytes) for pool in self.pools]
        self.held: list[dict[int, Held]] = [{} for _ in tenants]
        self.memory_of: dict[tuple[int, int, int], bytes] = {}
        """By layer, offset of a block and position in it: what is stored there."""

    def blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.layout.block_tokens)

    def content(self, layer: int, held: Held, position: int) -> bytes:
        return bytes([layer, *held.tokens[: position + 1]])

    def offset(self, cache: KVCache, block: int) -> int:
        """Where a block lies in the whole memory; -1 where there is none."""
        return -1 if block < 0 else cache.memory.tensor.data_ptr() - self.memory.tensor.data_ptr() + int(block)

    def where(self, cache: KVCache, layer: int, table: np.ndarray, position: int) -> tuple[int, int, int]:
        size = self.layout.block_tokens
        return layer, self.offset(cache, table[position // size]), position % size

    @rule(
        tenant=st.sampled_from(tenants),
        sequence=st.sampled_from(sequences),
        tokens=st.lists(st.integers(0, 1), max_size=24),
        same=st.integers(0, 24),
        ahead=st.none() | st.integers(1, 8),
        share=st.booleans(),
    )
    def reserve(self, tenant: int, sequence: int, tokens: list[int], same: int, ahead: int | None, share: bool) -> None:
        """Prompts begin alike, so that there is something to share."""
        cache, known = self.caches[tenant], self.held[tenant]
        tokens = [0] * min(same, len(tokens)) + tokens[same:]
        wanted = keys(tokens, self.layout.block_tokens) if share else []
        if sequence in known or not tokens:
            with pytest.raises(UsageError, match=f"sequence {sequence}"):
                cache.reserve(sequence, len(tokens), ahead=ahead, keys=wanted)
            return
        held_before = sum(self.blocks_of(len(held.tokens)) for held in known.values())
        fits = (held_before + self.blocks_of(len(tokens))) * self.layout.block_tokens <= cache.capacity_tokens
        free = cache.free_tokens
        windows = any(group.window is not None for group in cache.groups)
        usable = cache.match(wanted[: (len(tokens) - windows) // self.layout.block_tokens])
        try:
            shared = cache.reserve(sequence, len(tokens), ahead=ahead, keys=wanted)
        except CapacityError:
            assert not fits
            assert len(tokens) > free
            assert cache.free_tokens == free
            return
        assert shared == usable
        known[sequence] = Held(tokens, ahead, [shared] * len(self.layout.layers))

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), max_size=12))
    def extend(self, data: st.DataObject, more: list[int]) -> None:
        """A sequence goes on beyond what it reserved at first."""
        tenant, sequence = self.draw_sequence(data)
        cache, held = self.caches[tenant], self.held[tenant][sequence]
        tokens = len(held.tokens) + len(more)
        if not more:
            with pytest.raises(UsageError, match=f"sequence {sequence} holds {tokens} tokens; expected more"):
                cache.extend(sequence, tokens)
            return
        free = cache.free_tokens
        added = (self.blocks_of(tokens) - self.blocks_of(len(held.tokens))) * self.layout.block_tokens
        try:
            cache.extend(sequence, tokens)
        except CapacityError:
            assert added > free
            assert cache.free_tokens == free
        else:
            held.tokens = held.tokens + more

    @precondition(lambda self: any(self.held))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        tenant, sequence = self.draw_sequence(data)
        self.caches[tenant].release(sequence)
        del self.held[tenant][sequence]

    @rule(tenant=st.sampled_from(tenants), sequence=st.sampled_from(sequences))
    def release_or_ask_for_what_is_not_there(self, tenant: int, sequence: int) -> None:
        if sequence not in self.held[tenant]:
            for operation in (self.caches[tenant].release, lambda s: self.caches[tenant].filled(s, 0)):
                with pytest.raises(UsageError, match=f"sequence {sequence} holds no reservation"):
                    operation(sequence)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), layer=st.integers(0, 4), count=st.integers(1, 8), back=st.sampled_from([0, 0, 0, 1, 5]))
    def append(self, data: st.DataObject, layer: int, count: int, back: int) -> None:
        """One layer of a sequence goes on, no further ahead of the others than was said, or overwrites."""
        tenant, sequence = self.draw_sequence(data)
        cache, held = self.caches[tenant], self.held[tenant][sequence]
        layer %= len(self.layout.layers)
        start = max(0, held.filled[layer] - back)
        stop = min(len(held.tokens), start + count, min(held.filled) + held.ahead)
        if start < stop:
            placement = cache.place(Rows((Run(sequence, start, stop - start),)), attend=False)
            cache.require_past(layer, placement)
            self.write(cache, layer, placement, [held])
            assert cache.filled(sequence, layer) == held.filled[layer]

    @precondition(lambda self: any(self.held))
    @rule(tenant=st.sampled_from(tenants))
    def step(self, tenant: int) -> None:
        """All sequences that have the same positions in every layer get one more, as in plain decode."""
        cache = self.caches[tenant]
        ready = {
            sequence: held
            for sequence, held in self.held[tenant].items()
            if len(set(held.filled)) == 1 and held.filled[0] < len(held.tokens)
        }
        if ready:
            placement = cache.place(Rows(tuple(Run(sequence, held.filled[0], 1) for sequence, held in ready.items())))
            for layer in range(len(self.layout.layers)):
                cache.require_past(layer, placement)
                self.write(cache, layer, placement, list(ready.values()))

    @precondition(lambda self: any(self.held))
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        tenant, sequence = self.draw_sequence(data)
        cache, held = self.caches[tenant], self.held[tenant][sequence]
        complete = min(held.filled) // self.layout.block_tokens
        every = keys(held.tokens, self.layout.block_tokens)
        chosen = every[: data.draw(st.integers(0, len(every)))]
        if len(chosen) > complete:
            with pytest.raises(UsageError, match=f"sequence {sequence}: .* are to be published"):
                cache.publish(sequence, chosen)
        else:
            cache.publish(sequence, chosen)

    def draw_sequence(self, data: st.DataObject) -> tuple[int, int]:
        return data.draw(st.sampled_from([(i, s) for i, known in enumerate(self.held) for s in known]))

    def write(self, cache: KVCache, layer: int, placement: BlockPlacement, held: list[Held]) -> None:
        tables = placement.tables(cache.group_of(layer))
        for i, (run, own) in enumerate(zip(placement.rows.runs, held, strict=True)):
            for position in range(run.start, run.stop):
                place = self.where(cache, layer, tables[i], position)
                if position >= placement.frozen[i] and place[1] >= 0:
                    self.memory_of[place] = self.content(layer, own, position)
            own.filled[layer] = max(own.filled[layer], run.stop)
        cache.advance(layer, placement)

    @invariant()
    def what_a_window_reaches_is_there(self) -> None:
        """Everything that the next step of a sequence can attend to is what the sequence stored."""
        for cache, known in zip(self.caches, self.held, strict=True):
            for sequence, held in known.items():
                for layer, shape in enumerate(self.layout.layers):
                    alike = cache.groups[cache.group_of(layer)].layers
                    position = min(held.filled[other] for other in alike)
                    first = 0 if shape.window is None else max(0, position - shape.window + 1)
                    assert cache.filled(sequence, layer) == held.filled[layer]
                    if first < position:
                        table = table_of(cache, sequence, layer)
                        for seen in range(first, position):
                            stored = self.memory_of[self.where(cache, layer, table, seen)]
                            assert stored == self.content(layer, held, seen)

    @invariant()
    def blocks_do_not_overlap(self) -> None:
        """Neither of two groups nor of two tenants, nor across extents."""
        taken = set()
        for tenant, (cache, known) in enumerate(zip(self.caches, self.held, strict=True)):
            first = self.offset(cache, 0)
            for sequence in known:
                placement = cache.place(Rows((Run(sequence, 0, 1),)), attend=False)
                for group in range(len(cache.groups)):
                    (table,) = placement.tables(group)
                    assert placement.addresses[group, 0] == table.ctypes.data
                    size = cache.block_bytes[group]
                    taken |= {(first + int(block), size, tenant, group) for block in table if block >= 0}
                    for block in table[table >= 0]:
                        assert block // cache.extent_bytes == (block + size - 1) // cache.extent_bytes
                        assert block + size <= cache.memory.nbytes
        end = 0
        for start, size, *_ in sorted(taken):
            assert end <= start
            end = start + size

    @invariant()
    def space_is_accounted_for(self) -> None:
        for pool, cache, known in zip(self.pools, self.caches, self.held, strict=True):
            size = self.layout.block_tokens
            blocks = most_blocks(pool.extents, pool.extent_bytes, cache.block_bytes)
            assert cache.capacity_tokens == size * blocks
            assert set(cache.sequences) == set(known)
            held = size * sum(self.blocks_of(len(held.tokens)) for held in known.values())
            assert cache.free_tokens >= cache.capacity_tokens - held
            if not known:
                assert cache.free_tokens == cache.capacity_tokens

    def teardown(self) -> None:
        """Nothing has leaked: a cache can be filled to the last block, and when all is released, filled again. What was
        published may keep its extents until then."""
        if not hasattr(self, "caches"):
            return
        for cache, known in zip(self.caches, self.held, strict=True):
            for sequence in known:
                cache.release(sequence)
            for sequence in (98, 99):
                cache.reserve(sequence, cache.capacity_tokens)
                assert cache.free_tokens == 0
                cache.place(Rows((Run(sequence, 0, cache.capacity_tokens),)))
                cache.release(sequence)
                assert cache.free_tokens == cache.capacity_tokens


CacheMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestCache = CacheMachine.TestCase


def test_a_cache_too_small_for_one_block_says_both_numbers() -> None:
    with pytest.raises(CapacityError, match=r"a KV cache of 512 bytes cannot hold one block: 4 tokens take 448 bytes"):
        KVCache(layout(), ExtentPool(Memory(512), extent_bytes=256), layer_bytes)
    assert KVCache(layout(), ExtentPool(Memory(3 * 256), extent_bytes=256), layer_bytes).capacity_tokens == 4


def test_layers_of_a_group_lie_in_one_block() -> None:
    """One behind the other, and a block table for each group."""
    cache = make(3)

    assert [cache.group_of(layer) for layer in range(5)] == [0, 1, 0, 2, 1]
    assert cache.block_bytes == [128, 128, 192]
    assert [cache.layer_offset(layer) for layer in range(5)] == [0, 0, 64, 0, 64]


@pytest.mark.parametrize("layer", [-1, 5])
def test_there_is_no_such_layer(layer: int) -> None:
    cache = make(1)
    cache.reserve(0, 1)

    with pytest.raises(UsageError, match=f"layer {layer}: expected 0 <= layer < 5"):
        cache.filled(0, layer)


def test_a_full_cache_says_what_is_free() -> None:
    cache = make(3)
    cache.reserve(0, 5)

    with pytest.raises(CapacityError, match="sequence 1 needs 5 tokens of KV cache, 4 of 12 are free"):
        cache.reserve(1, 5)
    assert set(cache.sequences) == {0}


def test_overwriting_does_not_lower_the_watermark() -> None:
    """The last chunk of a prompt may come twice, and an old step after newer ones."""
    cache = make(1)
    cache.reserve(0, 4)
    store(cache, 0, Run(0, 0, 4))

    store(cache, 0, Run(0, 1, 2))

    assert cache.filled(0, 0) == 4
    assert cache.filled(0, 1) == 0


def test_a_step_that_was_placed_outlives_an_extension() -> None:
    """Its block table stays where it was, and a full cache says how much more was asked for."""
    cache = make(4)
    cache.reserve(0, 4)
    placed = cache.place(Rows((Run(0, 0, 4),)))
    tables = [placed.tables(group)[0] for group in range(len(cache.groups))]
    before = [table.tolist() for table in tables]

    cache.extend(0, 16)

    assert [table.ctypes.data for table in tables] == placed.addresses[:, 0].tolist()
    assert [table.tolist() for table in tables] == before
    with pytest.raises(CapacityError, match="sequence 0 needs 4 more tokens of KV cache, 0 of 16 are free"):
        cache.extend(0, 20)


def test_a_gap_in_one_run_refuses_them_all() -> None:
    cache = make(2)
    for sequence in (0, 1):
        cache.reserve(sequence, 4)
        store(cache, 0, Run(sequence, 0, 1))

    with pytest.raises(UsageError, match=r"sequence 1, layer 0: position 2 comes after 1 stored ones"):
        store(cache, 0, Run(0, 1, 1), Run(1, 2, 1))
    assert cache.filled(0, 0) == 1


def test_a_step_stays_within_reservations() -> None:
    """One run too long refuses them all, and assigns nothing."""
    cache = make(3)
    cache.reserve(0, 3)
    cache.reserve(1, 8)

    with pytest.raises(CapacityError, match=r"sequence 0 has space reserved for 3 tokens, position 3 needs 4"):
        cache.place(Rows((Run(1, 0, 1), Run(0, 0, 4))))
    assert (cache.place(Rows((Run(1, 0, 1),))).tables(0)[0] >= 0).tolist() == [True, False]


def test_a_step_does_not_outlive_its_sequences() -> None:
    """Also where another sequence has taken the place of the one that was released."""
    cache = make(2)
    cache.reserve(0, 4)
    cache.reserve(1, 4)
    placement = cache.place(Rows((Run(0, 0, 1), Run(1, 0, 1))))
    cache.release(1)
    cache.reserve(1, 4)

    for operation in (cache.require_past, cache.advance):
        with pytest.raises(UsageError, match="sequence 1 was released after its step had been planned"):
            operation(0, placement)
    assert cache.filled(0, 0) == cache.filled(1, 0) == 0


def test_many_sequences_find_their_places() -> None:
    """Far more than there is room for in the beginning."""
    cache = make(300)
    for sequence in range(300):
        cache.reserve(sequence, 4)
    store(cache, 0, *(Run(sequence, 0, 1 + sequence % 4) for sequence in range(300)))

    assert [cache.filled(sequence, 0) for sequence in range(300)] == [1 + i % 4 for i in range(300)]
    placement = cache.place(Rows(tuple(Run(sequence, 0, 1) for sequence in range(300))))
    assert len({int(table[0]) for table in placement.tables(0)}) == 300


def test_blocks_behind_a_window_serve_others() -> None:
    """A sequence much longer than the cache holds decodes in a windowed layer, from few blocks that go round."""
    cache = make(12, layers=(SLIDING,), extent=64)
    for sequence in range(4):
        cache.reserve(sequence, 400, ahead=1)
    assert cache.free_tokens == 0

    for position in range(400):
        store(cache, 0, *(Run(sequence, position, 1) for sequence in range(4)))
        tables = cache.place(Rows(tuple(Run(sequence, position, 1) for sequence in range(4)))).tables(0)
        live = [{*table[table >= 0].tolist()} for table in tables]
        assert all(len(blocks) <= 3 for blocks in live)
        assert len(set.union(*live)) == sum(map(len, live))


def test_a_window_that_reaches_what_was_freed_is_refused() -> None:
    """To store there is allowed, and nothing is stored; to attend is not."""
    cache = make(8, layers=(SLIDING,))
    cache.reserve(0, 40, ahead=1)
    for position in range(40):
        store(cache, 0, Run(0, position, 1))

    late = store(cache, 0, Run(0, 3, 2))
    assert late.tables(0)[0][:2].tolist() == [-1, -1]
    assert cache.filled(0, 0) == 40
    with pytest.raises(
        UsageError, match=r"the window of position 3 reaches back to 0, but positions before 32 were freed"
    ):
        cache.place(Rows((Run(0, 3, 2),)))
    assert np.flatnonzero(table_of(cache, 0, 0) >= 0).tolist() == [8, 9]


def test_layers_further_apart_than_reserved_are_refused() -> None:
    cache = make(8, layers=(SLIDING, SLIDING))
    cache.reserve(0, 40, ahead=4)
    before = cache.free_tokens

    with pytest.raises(CapacityError, match="layers are further apart than the reservation said"):
        cache.place(Rows((Run(0, 0, 20),)))
    assert cache.free_tokens == before


PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]


def test_a_prompt_is_shared_where_it_begins_alike() -> None:
    """Whole blocks, once in memory, from the watermark that the first sequence left, and never overwritten."""
    cache = make(8)
    cache.reserve(0, 13)
    fill(cache, 0, 0, 13)
    cache.publish(0, keys(PROMPT))
    other = [*PROMPT[:8], 0, 0, 0, 0, 0]

    assert cache.match(keys(other)) == 8
    assert cache.reserve(1, 13, keys=keys(other)) == 8
    assert [cache.filled(1, layer) for layer in range(5)] == [8] * 5
    placement = cache.place(Rows((Run(0, 12, 1), Run(1, 8, 5))))
    assert placement.frozen.tolist() == [12, 8]
    for group, gone in enumerate([0, 1, 0]):  # blocks that the window has left behind
        first, second = placement.tables(group)
        assert first[gone:2].tolist() == second[gone:2].tolist()
        assert (first[:gone] == -1).all()
        assert not {*first[2:].tolist()} & {*second[2:].tolist()}


def test_a_shared_prompt_takes_its_space_once() -> None:
    cache = make(7, layers=(FULL,), extent=64)
    cache.reserve(0, 13)
    fill(cache, 0, 0, 13)
    cache.publish(0, keys(PROMPT))

    for sequence in (1, 2, 3):
        assert cache.reserve(sequence, 13, keys=keys(PROMPT)) == 12
    assert cache.free_tokens == 0
    with pytest.raises(CapacityError):
        cache.reserve(4, 13, keys=keys(PROMPT))
    cache.release(0)
    assert cache.free_tokens == 4
    assert cache.match(keys(PROMPT)) == 12


def test_a_prompt_stays_to_be_found_until_its_space_is_needed() -> None:
    """What no sequence holds counts as free; the prompt that was released first is lost first, from its end."""
    cache = make(6, layers=(FULL,), extent=64)
    prompts = [[i] * 8 for i in range(3)]
    for sequence, prompt in enumerate(prompts):
        cache.reserve(sequence, 8)
        fill(cache, sequence, 0, 8)
        cache.publish(sequence, keys(prompt))
    for sequence in (1, 0, 2):
        cache.release(sequence)

    assert cache.free_tokens == cache.capacity_tokens == 24
    assert [cache.match(keys(prompt)) for prompt in prompts] == [8, 8, 8]
    cache.reserve(3, 4)
    store(cache, 0, Run(3, 0, 1))
    assert [cache.match(keys(prompt)) for prompt in prompts] == [8, 4, 8]
    cache.reserve(4, 8)
    store(cache, 0, Run(4, 0, 8))
    assert [cache.match(keys(prompt)) for prompt in prompts] == [4, 0, 8]


def test_all_of_a_reservation_can_be_shared() -> None:
    """A node may have nothing more to store when a sequence lies on several nodes."""
    cache = make(4, layers=(FULL,))
    cache.reserve(0, 8)
    fill(cache, 0, 0, 8)
    cache.publish(0, keys(PROMPT[:8]))

    assert cache.match(keys(PROMPT[:8])) == 8
    assert cache.reserve(1, 8, keys=keys(PROMPT[:8])) == 8
    assert cache.filled(1, 0) == 8


def test_windowed_layers_need_only_what_their_window_reaches() -> None:
    """A prompt can be shared although its beginning was freed; where the end is missing it cannot."""
    cache = make(8, layers=(SLIDING,))
    cache.reserve(0, 13, ahead=1)
    for position in range(13):
        store(cache, 0, Run(0, position, 1))
    cache.publish(0, keys(PROMPT))

    assert cache.match(keys(PROMPT)) == 12
    assert cache.match(keys(PROMPT)[:1]) == 0
    assert cache.reserve(1, 20, ahead=1, keys=keys(PROMPT)) == 12
    (table,) = cache.place(Rows((Run(1, 12, 1),))).tables(0)
    assert (table >= 0).tolist() == [False, True, True, True, False]


def test_sharing_behind_a_window_saves_no_space() -> None:
    """A sequence that goes on needs blocks of its own while another still holds those that both had."""
    for blocks in (5, 6):
        cache = make(blocks, layers=(SLIDING,), extent=64)
        cache.reserve(0, 40, ahead=1)  # three blocks at once
        for position in range(12):
            store(cache, 0, Run(0, position, 1))
        cache.publish(0, keys(PROMPT))
        if blocks == 5:
            with pytest.raises(CapacityError):
                cache.reserve(1, 40, ahead=1, keys=keys(PROMPT))
    assert cache.reserve(1, 40, ahead=1, keys=keys(PROMPT)) == 12

    for sequence in (0, 1):
        for position in range(12, 40):
            store(cache, 0, Run(sequence, position, 1))
    first, second = cache.place(Rows((Run(0, 39, 1), Run(1, 39, 1)))).tables(0)
    assert not {*first[first >= 0].tolist()} & {*second[second >= 0].tolist()}


def test_the_first_publisher_of_a_key_stays() -> None:
    """Two sequences that computed the same prompt at once keep their own blocks; others share the first."""
    cache = make(6, layers=(FULL,), extent=64)
    for sequence in (0, 1):
        cache.reserve(sequence, 8)
        fill(cache, sequence, 0, 8)
        cache.publish(sequence, keys(PROMPT[:8]))
    cache.reserve(2, 8, keys=keys(PROMPT[:8]))

    first, second, third = cache.place(Rows((Run(0, 7, 1), Run(1, 7, 1), Run(2, 4, 1)))).tables(0)
    assert third[0] == first[0] != second[0]


def test_blocks_that_are_not_complete_are_not_published() -> None:
    cache = make(4)
    cache.reserve(0, 8)
    for layer in range(4):
        store(cache, layer, Run(0, 0, 8))

    with pytest.raises(UsageError, match=r"sequence 0: 2 blocks .* but only 0 positions are stored in every layer"):
        cache.publish(0, keys(PROMPT[:8]))
    fill(cache, 0, 0, 8)
    with pytest.raises(UsageError, match="expected a key of 16 bytes for a block, got 3"):
        cache.publish(0, [b"abc"])


def test_a_reservation_says_how_far_ahead_a_step_may_be() -> None:
    cache = make(1)

    with pytest.raises(UsageError, match="sequence 0: expected ahead >= 1, got 0"):
        cache.reserve(0, 1, ahead=0)
