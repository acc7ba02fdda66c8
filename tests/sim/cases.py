"""What happens to a simulated cluster in a run of `tests.sim.chaos`: all of it is drawn from a seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from random import Random
from typing import NamedTuple

from msgspec.structs import replace as changed

from lamina.attention import default_backend
from lamina.attention.backend import require_backend
from lamina.config import ClusterConfig, PipelineConfig, RecoveryConfig
from lamina.node.daemon import DRAIN_TIMEOUT_S
from lamina.node.neighbours import PAUSES_S
from lamina.node.quorum import LEAST_S
from lamina.node.roster import REFUSED_PAUSE_S
from lamina.node.succession import OTHERS_S
from lamina.sim.cluster import REACH_S
from lamina.sim.link import LinkModel
from lamina.wire.requests import Sampling
from tests.sim.clusters import BLOCK_TOKENS, JITTER, LINK, SECONDS, make_config
from tests.sim.exact import VOCABULARY, Asking, shape_of
from tests.sim.faults import KINDS, RESTART_S, SLOW_TIMES, Fault, Kind, Nodes

HEADS = 6
CONTEXT = 80
FIND_S = PAUSES_S[1] + REFUSED_PAUSE_S + 1.0
"""Virtual seconds within which nodes that are back find each other."""
PATIENCE_S = 60.0
"""Virtual seconds that clients wait for a front that is lost."""


@dataclass(frozen=True)
class Ask:
    """A request: what is asked, by which client, and when."""

    at_s: float
    client: int
    asking: Asking
    priority: int
    shares: bool
    leaves_after: int | None
    """Its client leaves after so many tokens."""

    def __str__(self) -> str:
        s = self.asking.sampling
        how = "greedy" if not s.temperature else f"temperature {s.temperature} top_k {s.top_k} seed {s.seed}"
        leaves = "" if self.leaves_after is None else f", left after {self.leaves_after}"
        return (
            f"at {self.at_s:.4f} s client {self.client}: {len(self.asking.prompt)} tokens, "
            f"{self.asking.tokens} wanted, {how}, priority {self.priority}"
            f"{'' if self.shares else ', shares nothing'}{leaves}"
        )


@dataclass(frozen=True)
class Case:
    """All that happens to a cluster."""

    seed: int
    layers: int
    compute: tuple[tuple[str, range | None], ...]
    memory: tuple[tuple[str, int], ...]
    """Names, and the blocks that they have room for if ``least_memory`` nodes are there."""
    least_memory: int
    """How many of the memory nodes can hold the longest request together."""
    pipeline: PipelineConfig
    ahead_blocks: int
    """Blocks that the scheduler reserves ahead: fewer than usual, so that sequences preempt each other."""
    link: LinkModel
    peer_timeout: float
    grace: float
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        p = self.pipeline
        return "\n".join(
            [
                "compute: " + ", ".join(f"{n}{'' if r is None else f' layers {r}'}" for n, r in self.compute),
                "memory: "
                + ", ".join(f"{name} of {held} blocks" for name, held in self.memory)
                + f"; {self.least_memory} of them hold any request",
                (
                    f"{self.layers} layers, partition {p.partition}, batches {p.batches} of {p.max_batch}, "
                    f"prefill_tokens {p.prefill_tokens}, prefill_kv {p.prefill_kv}, ahead_blocks {self.ahead_blocks}, "
                    f"peer_timeout {self.peer_timeout} s, grace {self.grace} s, {self.link}"
                ),
                *(f"ask {i} {ask}" for i, ask in enumerate(self.asks)),
                *(f"fault {i} {fault}" for i, fault in enumerate(self.faults)),
            ]
        )

    @cached_property
    def nodes(self) -> Nodes:
        return Nodes(tuple(name for name, _ in self.compute), tuple(name for name, _ in self.memory))

    @cached_property
    def config(self) -> ClusterConfig:
        config = make_config(
            compute=[layers for _, layers in self.compute],
            memory=[self._bytes_of(held) for _, held in self.memory],
            memory_nodes=len(self.memory),
            pipeline=self.pipeline,
        )
        transport = changed(config.transport, peer_timeout=self.peer_timeout)
        named = [changed(n, name=name) for n, name in zip(config.node, self.nodes.all, strict=True)]
        return changed(
            config,
            node=named,
            transport=transport,
            links=transport.options(config.file.parent),
            recovery=RecoveryConfig(grace=self.grace),
        )

    def _bytes_of(self, held: int) -> int:
        heads = -(-HEADS // self.least_memory) if self.pipeline.partition == "heads" else HEADS
        block = self.layers * require_backend(default_backend()).layer_bytes(shape_of(heads), "float32", BLOCK_TOKENS)
        return block * held + 64

    @cached_property
    def kinds(self) -> list[Kind]:
        return [KINDS[fault.kind] for fault in self.faults]

    # -- what may come of it

    @property
    def forgotten_s(self) -> float:
        """The longest until a node is forgotten that has joined and was lost."""
        joins = any(kind.group == "join" for kind in self.kinds)
        return max(self.grace, self.config.recovery.lease) + self.lost_s if joins else 0.0

    @property
    def loses_front(self) -> bool:
        """Whether the front may have to start again, or another node to take its part."""
        front = self.nodes.compute[0]
        return any(kind.is_outage and front in fault.who for fault, kind in zip(self.faults, self.kinds, strict=True))

    @cached_property
    def may_fail(self) -> bool:
        """Whether nodes are away for so long that requests need not be answered."""
        away: Counter[str] = Counter()
        for fault, kind in zip(self.faults, self.kinds, strict=True):
            if kind.is_outage:
                # Of two that are cut off from each other the front gives up either, but not itself.
                names = [name for name in fault.who if len(fault.who) == 1 or name != self.nodes.compute[0]]
                for name in names:
                    away[name] += inf if fault.lasts_s is None else fault.lasts_s + self.lost_s
        front = self.nodes.compute[0]
        gone = {name for name, seconds in away.items() if seconds > self.patience_s(name)}
        if front in gone or (self.loses_front and gone & set(self.nodes.compute) and gone & set(self.nodes.memory)):
            return True  # of what stays away, a compute node may be the front, with a memory node
        if self.loses_front and gone & set(self.nodes.compute) & self._astray:
            return True  # it may take the part of a front that starts again, and has not heard of the requests
        has_ranges = self.compute[0][1] is not None
        return (has_ranges and bool(gone & set(self.nodes.compute))) or (
            len(set(self.nodes.memory) - gone) < self.least_memory
        )

    @property
    def _astray(self) -> set[str]:
        """The nodes that run, or will go on, while others take them for lost."""
        ways = ((fault, kind.name.rpartition(".")[2]) for fault, kind in zip(self.faults, self.kinds, strict=True))
        return {name for fault, way in ways if way in ("freeze", "cut", "one-way") for name in fault.who}

    # -- how long it may take

    def patience_s(self, name: str) -> float:
        """Virtual seconds that requests wait for a node."""
        if name == self.nodes.compute[0]:
            return PATIENCE_S
        has_layers_alone = name in self.nodes.compute and self.compute[0][1] is not None
        return max(self.grace, self.config.recovery.lease) if has_layers_alone else self.grace

    @property
    def step_s(self) -> float:
        """The longest that a step may take of itself, when it has all nodes to itself."""
        link = self.link
        messages = 4 * (link.latency_s + link.jitter_s + 1e5 / link.bytes_per_s)
        return (self.layers + 1) * (sum(SECONDS.values()) + messages)

    @property
    def lost_s(self) -> float:
        """The longest until a loss is noticed, plus the longest until a node that is back is found."""
        return self.peer_timeout + RESTART_S + FIND_S

    @property
    def trouble_s(self) -> float:
        """The longest that faults may keep the cluster from working, or requests from failing."""
        faults = sum(self._trouble_s(fault, kind) for fault, kind in zip(self.faults, self.kinds, strict=True))
        takeovers = (self.grace + OTHERS_S) * (2 + len(self.compute)) if self.loses_front else 0.0
        starts = max(self.grace, LEAST_S) if self.loses_front else 0.0
        return faults + (takeovers + starts) * len(self.faults)

    def _trouble_s(self, fault: Fault, kind: Kind) -> float:
        lasts_s = fault.lasts_s
        if lasts_s is None:
            lasts_s = REACH_S + max(map(self.patience_s, fault.who))
        redivided_s = self.grace if kind.group == "join" else 0.0
        return lasts_s + self.lost_s + redivided_s + (DRAIN_TIMEOUT_S if kind.is_drained else 0.0)

    @property
    def work_s(self) -> float:
        """The longest that all requests may take: one after the other, anew after each fault, all slow."""
        rows = sum(len(ask.asking.prompt) + ask.asking.tokens for ask in self.asks)
        slow = SLOW_TIMES if any(kind.group == "slow" for kind in self.kinds) else 1.0
        return rows * self.step_s * slow * (2 + len(self.faults))

    @property
    def most_step_s(self) -> float:
        """The longest that a step may take: waiting for the batches in flight, and for everybody who stands still."""
        slow = SLOW_TIMES if any(kind.group == "slow" for kind in self.kinds) else 1.0
        rows = self.pipeline.batches * 4 * len(self.compute)
        return rows * self.step_s * slow + sum(self._still_s(fault) for fault in self.faults)

    def _still_s(self, fault: Fault) -> float:
        lasts_s = inf if fault.lasts_s is None else fault.lasts_s
        # A front that stands still notices nothing.
        # What is silent is looked for in steps of a quarter.
        return lasts_s if fault.kind == "front.freeze" else min(lasts_s, 1.25 * self.peer_timeout)


COMPUTE: tuple[tuple[range | None, ...], ...] = (
    (None,),
    (None, None),
    (None, None, None),
    (range(1), range(1, 2)),
    (range(1), range(1, 2), range(2, 3)),
)
WITHIN_S = 0.015
"""Virtual seconds within which requests are asked and faults strike."""


def draw(seed: int, kinds: Sequence[str] = ()) -> Case:
    """The case of a seed; its cluster and its requests are the same whatever the ``kinds`` of its faults."""
    chance = Random(f"chaos {seed}")
    crowd = chance.random() < 0.2
    compute = chance.choice(COMPUTE)
    layers = max(2, *(r.stop for r in compute if r is not None), 2)
    pipeline = PipelineConfig(
        batches=chance.randint(1, 3),
        max_batch=chance.choice((2, 4, 8)),
        prefill_tokens=chance.choice((4, 16, 16)),
        prefill_kv=chance.choice((2**30, 2**30, 2**12)),
        partition=chance.choice(("heads", "requests", "tokens")),
    )
    names = [f"m{i}" for i in range(chance.randint(1, 5 if not crowd or pipeline.partition == "heads" else 2))]
    least = chance.choice((1, chance.randint(1, len(names))))
    need = CONTEXT // BLOCK_TOKENS
    if pipeline.partition != "heads":
        need = -(-need // least)
    memory = [(name, need + chance.choice((0, 1, 2) if crowd else (0, 3, 6))) for name in names]
    ahead = 1 if crowd else chance.choice((1, 4))
    peer_timeout = chance.choice((0.5, 4.0))
    grace = chance.choice((1.0, 10.0))
    link = chance.choice((LINK, LINK, JITTER))
    asks = _draw_asks(chance, crowd=crowd)
    nodes = Nodes(tuple(f"c{i}" for i in range(len(compute))), tuple(names))
    chance = Random(f"faults {seed}")
    faults = []
    for _ in range(chance.choice((1, 1, 2, 2, 3, 5)) if kinds else 0):
        fault = KINDS[chance.choice(kinds)].draw(nodes, chance, WITHIN_S, peer_timeout)
        faults += [] if fault is None else [fault]
    return Case(
        seed=seed,
        layers=layers,
        compute=tuple(zip(nodes.compute, compute, strict=True)),
        memory=tuple(memory),
        least_memory=least,
        pipeline=pipeline,
        ahead_blocks=ahead,
        link=link,
        peer_timeout=peer_timeout,
        grace=grace,
        asks=asks,
        faults=tuple(sorted(faults, key=lambda fault: fault.at_s)),
    )


def _draw_asks(chance: Random, *, crowd: bool) -> tuple[Ask, ...]:
    """Requests of all kinds; or a crowd that comes at once, begins small and grows, so that it is in its own way."""
    beginning = [chance.randrange(VOCABULARY) for _ in range(48)]
    clients = chance.randint(1, 3)
    asks = []
    for _ in range(chance.randint(3, 4) if crowd else chance.randint(3, 8)):
        shared = [] if crowd else beginning[: chance.choice((0, 0, 0, 20, 34, 48))]
        own = [chance.randrange(VOCABULARY) for _ in range(chance.choice((1, 2, 5, 5 if crowd else 20)))]
        prompt = (*shared, *own)
        sampling = chance.choice(
            (
                Sampling(seed=0),
                Sampling(seed=0),
                Sampling(temperature=1.0, seed=chance.getrandbits(32)),
                Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=chance.getrandbits(32)),
                Sampling(seed=0, repetition_penalty=1.3, frequency_penalty=0.5),
            )
        )
        most = chance.choice((CONTEXT, CONTEXT, 20)) if crowd else chance.choice((3, 12, 20, 30))
        asks.append(
            Ask(
                at_s=(0.003 if crowd else WITHIN_S) * chance.random(),
                client=chance.randrange(clients),
                asking=Asking(prompt, min(most, CONTEXT - len(prompt)), sampling),
                priority=chance.choice((0, 0, 5)),
                shares=chance.random() < 0.8,
                leaves_after=chance.choice((*([None] * 6), 0, 2)),
            )
        )
    return tuple(sorted(asks, key=lambda ask: ask.at_s))


# -- smaller cases


class Part(NamedTuple):
    """What is left of a case: the numbers of its faults and requests, and the names of its nodes."""

    faults: tuple[int, ...]
    asks: tuple[int, ...]
    nodes: tuple[str, ...]

    @staticmethod
    def whole(case: Case) -> Part:
        return Part(tuple(range(len(case.faults))), tuple(range(len(case.asks))), case.nodes.all)

    def of(self, case: Case) -> Case:
        """The smaller case. ValueError if it has no sense."""
        compute = tuple(node for node in case.compute if node[0] in self.nodes)
        memory = tuple(node for node in case.memory if node[0] in self.nodes)
        has_ranges = case.compute[0][1] is not None
        if (
            len(memory) < case.least_memory
            or not compute
            or compute[0] != case.compute[0]
            or (has_ranges and compute != case.compute)
        ):
            raise ValueError(f"no cluster has only the nodes {', '.join(self.nodes) or 'none'} of these")
        faults = []
        for fault in map(case.faults.__getitem__, self.faults):
            who = tuple(name for name in fault.who if name in self.nodes)
            if who == fault.who or fault.who == case.nodes.all:
                faults.append(fault._replace(who=who))
            elif KINDS[fault.kind].group == "join":
                faults.append(fault)
        asks = tuple(map(case.asks.__getitem__, self.asks))
        return replace(case, compute=compute, memory=memory, faults=tuple(faults), asks=asks)

    def smaller(self) -> Iterator[Part]:
        """All that have one fault, one request or one node less."""
        for field in ("faults", "asks", "nodes"):
            every = getattr(self, field)
            for i in range(len(every)):
                yield self._replace(**{field: every[:i] + every[i + 1 :]})

    def options(self) -> str:
        """How the command is told."""
        numbers = [",".join(map(str, some)) or "none" for some in (self.faults, self.asks)]
        return f"--faults {numbers[0]} --asks {numbers[1]} --nodes {','.join(self.nodes)}"
