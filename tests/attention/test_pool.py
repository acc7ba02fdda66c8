from __future__ import annotations

import mmap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lamina.attention import ExtentPool, Memory, MemoryRange, QuotaPool
from lamina.attention.available import available_bytes
from lamina.attention.pool import fit_extent, most_blocks, numa_node_of, numa_nodes
from lamina.errors import CapacityError, ConfigError, UsageError

PAGE = 4096
MIB = 1 << 20


def resident_bytes() -> int:
    """Memory of this process that is really there."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def test_memory_is_there_from_the_start_and_gone_when_closed() -> None:
    """Every page is touched at once; closing gives them back although a view is left."""
    before = resident_bytes()
    memory = Memory(64 * MIB)
    view = memory.tensor[MIB:]

    assert memory.tensor.shape == (64 * MIB,)
    assert memory.tensor.data_ptr() % PAGE == 0
    assert resident_bytes() - before > 63 * MIB
    assert not memory.tensor.any()
    report = memory.report()
    assert (report.nbytes, report.numa) == (64 * MIB, None)

    memory.close()
    assert resident_bytes() - before < 8 * MIB
    assert not view[:PAGE].any()


def test_others_can_map_memory_while_much_is_taken() -> None:
    """A node's event loop, which maps rings and regions, must not stand still and fall silent meanwhile."""
    started = time.monotonic()
    with ThreadPoolExecutor(1) as thread:
        taken = thread.submit(Memory, 512 * MIB)
        longest = 0.0
        while not taken.done():
            before = time.monotonic()
            mmap.mmap(-1, PAGE).close()
            longest = max(longest, time.monotonic() - before)
            time.sleep(0.005)
        seconds = time.monotonic() - started
        taken.result().close()

    assert longest < max(0.3, seconds / 2)


@pytest.mark.parametrize("nbytes", [1 << 45, 1 << 62, 1 << 70])
def test_memory_that_cannot_be_had_is_a_capacity_error(nbytes: int) -> None:
    """More than the machine has, than addresses reach and than a number holds."""
    with pytest.raises(CapacityError, match=f"{nbytes} bytes of memory cannot be had on cpu: "):
        Memory(nbytes)


def test_memory_lies_on_the_numa_node_that_was_asked_for() -> None:
    """Where no sandbox forbids it."""
    try:
        memory = Memory(4 * MIB, numa=0)
    except ConfigError as error:
        pytest.skip(str(error))
    address = f"{memory.tensor.data_ptr():x}"
    (line,) = (line for line in Path("/proc/self/numa_maps").read_text().splitlines() if line.startswith(address))
    assert "bind:0" in line
    assert memory.report().numa == 0


def test_a_numa_node_that_does_not_exist_is_refused_by_number() -> None:
    with pytest.raises(ConfigError, match=r"numa: expected one of this machine's NUMA nodes \[0.*\], got 4095"):
        Memory(PAGE, numa=4095)


def test_processors_without_a_common_numa_node_have_none() -> None:
    assert numa_node_of(frozenset({99_999})) is None
    assert numa_node_of(frozenset()) is None


def test_processors_of_a_numa_node_find_it() -> None:
    """Alone and all together, where the system says which it has."""
    nodes: dict[int, set[int]] = {}
    for path in Path("/sys/devices/system/node").glob("node[0-9]*/cpu[0-9]*"):
        nodes.setdefault(int(path.parent.name[4:]), set()).add(int(path.name[3:]))
    if not nodes:
        pytest.skip("this system does not say which processors its NUMA nodes have")
    for node, cpus in nodes.items():
        assert node in numa_nodes()
        assert numa_node_of(frozenset(cpus)) == node
        assert {numa_node_of(frozenset({cpu})) for cpu in cpus} == {node}


SYSTEM = {
    "proc/meminfo": "MemTotal:  9000 kB\nMemFree:   100 kB\nMemAvailable:   8000 kB\n",
    "proc/self/cgroup": "1:name=old:/x\n0::/outer/inner\n",
    "sys/fs/cgroup/outer/memory.max": "700000\n",
    "sys/fs/cgroup/outer/memory.current": "500000\n",
    "sys/fs/cgroup/outer/memory.stat": "anon 100000\nactive_file 30000\ninactive_file 4000\n",
    "sys/fs/cgroup/outer/inner/memory.max": "max\n",
    "sys/fs/cgroup/outer/inner/memory.current": "500000\n",
    "sys/devices/system/node/node1/meminfo": "Node 1 MemTotal: 4000 kB\nNode 1 MemFree:  30 kB\n"
    "Node 1 Active(file):   7 kB\nNode 1 Inactive(file):   5 kB\n",
}


def test_what_can_be_had_is_the_least_of_all_limits(tmp_path: Path) -> None:
    """The machine's, those of all control groups above the process, and the NUMA node's; unknown ones do not count."""
    assert available_bytes(root=tmp_path) == {}
    for name, text in SYSTEM.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    every = {"on this machine": 8000 * 1024, "in its control group": 234_000}

    assert available_bytes(root=tmp_path) == available_bytes(0, root=tmp_path) == every
    assert available_bytes(1, root=tmp_path) == {**every, "on NUMA node 1": 42 * 1024}

    (tmp_path / "sys/fs/cgroup/outer/inner/memory.max").write_text("400000\n")
    assert available_bytes(root=tmp_path)["in its control group"] == 0


class QuotaPoolMachine(RuleBasedStateMachine):
    """Tenants that allocate and free, beside what each of them has written into its range."""

    @initialize(nbytes=st.integers(64, 12 * PAGE))
    def start(self, nbytes: int) -> None:
        self.memory = Memory(nbytes)
        self.pool = QuotaPool(self.memory)
        self.ranges: dict[str, MemoryRange] = {}

    @rule(number=st.integers(0, 5), nbytes=st.none() | st.integers(0, 13 * PAGE) | st.just(PAGE))
    def allocate(self, number: int, nbytes: int | None) -> None:
        """What fits between the others is allocated, and nothing else."""
        tenant = f"t{number}"
        if tenant in self.ranges:
            with pytest.raises(UsageError, match=f"tenant {tenant} has memory already"):
                self.pool.allocate(tenant, nbytes)
            return
        longest = max(stop - start for start, stop in self.gaps())
        if not longest or nbytes == 0 or (nbytes or 0) > longest:
            have = [f"{other} has {own.nbytes}" for other, own in self.ranges.items()]
            with pytest.raises(CapacityError) as refused:
                self.pool.allocate(tenant, nbytes)
            expected = [
                str(self.memory.nbytes),
                *have,
                *([str(nbytes), f"{longest} of them in one piece"] if nbytes else []),
            ]
            assert all(text in str(refused.value) for text in expected)
            return
        own = self.pool.allocate(tenant, nbytes)
        assert own.nbytes == len(own.tensor) == nbytes or (nbytes is None and own.nbytes == longest)
        assert own.tensor.data_ptr() % PAGE == 0
        own.tensor.fill_(number + 1)
        self.ranges[tenant] = own

    def gaps(self) -> list[tuple[int, int]]:
        """Runs of pages that no tenant has any part of."""
        base = self.memory.tensor.data_ptr()
        starts = [own.tensor.data_ptr() - base for own in self.ranges.values()]
        taken = {
            page
            for start, own in zip(starts, self.ranges.values(), strict=True)
            for page in range(start // PAGE, -(-(start + own.nbytes) // PAGE))
        }
        runs, first = [(0, 0)], 0
        for page in range(-(-self.memory.nbytes // PAGE) + 1):
            start = min(page * PAGE, self.memory.nbytes)
            if page in taken or start == self.memory.nbytes:
                runs.append((first, max(first, start)))
                first = min(start + PAGE, self.memory.nbytes)
        return runs

    @rule(number=st.integers(0, 5))
    def free(self, number: int) -> None:
        tenant = f"t{number}"
        if tenant in self.ranges:
            self.pool.free(tenant)
            del self.ranges[tenant]
        else:
            with pytest.raises(UsageError, match=f"tenant {tenant} frees memory, but has none"):
                self.pool.free(tenant)

    @invariant()
    def no_tenant_writes_where_another_has_memory(self) -> None:
        for tenant, own in self.ranges.items():
            assert (own.tensor == int(tenant[1:]) + 1).all()


QuotaPoolMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestQuotaPool = QuotaPoolMachine.TestCase


@given(extents=st.integers(0, 12), uses=st.lists(st.none() | st.integers(0, 11), max_size=40))
def test_extents_are_allocated_and_freed(extents: int, uses: list[int | None]) -> None:
    """Beside a set: each once, and never one that is not there."""
    pool, taken = ExtentPool(Memory(extents * 128 + 127), extent_bytes=128), set[int]()
    for extent in uses:
        assert pool.available == extents - len(taken)
        if extent is None and len(taken) < extents:
            new = pool.allocate()
            assert new in set(range(extents)) - taken
            taken.add(new)
        elif extent is None:
            with pytest.raises(CapacityError, match=f"all {extents} extents of 128 bytes are allocated"):
                pool.allocate()
        elif extent in taken:
            pool.free(extent)
            taken.remove(extent)
        else:
            with pytest.raises(UsageError, match=f"extent {extent} is to be freed, but not allocated"):
                pool.free(extent)


@pytest.mark.parametrize("extent_bytes", [0, 100, -64])
def test_extents_are_whole_cache_lines(extent_bytes: int) -> None:
    with pytest.raises(UsageError, match=f"expected a multiple of 64 above 0, got {extent_bytes}"):
        ExtentPool(Memory(PAGE), extent_bytes=extent_bytes)


@settings(max_examples=200, deadline=None)
@given(
    lines=st.lists(st.integers(1, 1000) | st.integers(1, 40_000), min_size=1, max_size=4),
    blocks=st.integers(500, 20_000),
    rest=st.integers(0, 10_000),
)
def test_extents_that_suit_a_layout_lose_little(lines: list[int], blocks: int, rest: int) -> None:
    """Less than 7 % of the memory, whatever the sizes of the blocks, where it holds 500 of each."""
    sizes = [64 * line for line in lines]
    nbytes = blocks * sum(sizes) + rest
    extent = fit_extent(nbytes, sizes)

    held = most_blocks(nbytes // extent, extent, sizes)

    assert held * sum(sizes) > 0.93 * nbytes
    assert sum(-(-held // (extent // size)) for size in sizes) <= nbytes // extent
    assert sum(-(-(held + 1) // (extent // size)) for size in sizes) > nbytes // extent


@given(blocks=st.integers(1, 15), line=st.integers(1, 1000))
def test_little_memory_holds_what_fits(blocks: int, line: int) -> None:
    """A few blocks of one size, with nothing lost at all."""
    size = 64 * line
    extent = fit_extent(blocks * size, [size])

    assert most_blocks(blocks * size // extent, extent, [size]) == blocks


def test_a_view_reaches_all_of_the_memory() -> None:
    """The last byte can be written and read, also where the size is no multiple of a page."""
    memory = Memory(3 * PAGE + 100)
    memory.tensor[-1] = 7

    assert np.asarray(memory.tensor)[-1] == 7
