"""What can befall a simulated cluster: nodes that die, stop, stand still or join; a network that is cut or slow."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from lamina.config import ComputeNodeConfig, MemoryNodeConfig, NodeConfig
from lamina.errors import LaminaError
from lamina.ops.drain import drained
from lamina.runtime.spans import Place
from lamina.sim.cluster import SimCluster
from lamina.transport import Address
from tests.sim.clusters import seconds

RESTART_S = 0.2
"""Virtual seconds until what restarts nodes starts one again that has ended by itself."""
SLOW_TIMES = 10.0
DRAIN_PATIENCE_S = 0.05
"""Virtual seconds until what finds no room elsewhere is computed anew."""
LEAVE_S = 60.0
"""Virtual seconds that a guest may take to leave before it is killed."""


class Nodes(NamedTuple):
    """The names of a cluster's nodes, the front being the first compute node."""

    compute: tuple[str, ...]
    memory: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return *self.compute, *self.memory


class Fault(NamedTuple):
    """Something that begins at ``at_s``, counted from when the cluster is ready, and lasts so long; None: for good."""

    kind: str
    at_s: float
    who: tuple[str, ...]
    lasts_s: float | None

    def __str__(self) -> str:
        lasts = "for good" if self.lasts_s is None else f"for {self.lasts_s:.4g} s"
        return f"at {self.at_s:.4f} s {self.kind} {'-'.join(self.who)} {lasts}"


class Troubled(SimCluster):
    """A cluster with its present troubles. Several may befall a node at a time: it is well when all have ended.

    A node that ends by itself is started again, as a supervisor does.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, seconds=self._seconds_of, **options)
        self.by_themselves: dict[str, BaseException | None] = {}
        """Nodes that have ended although nobody told them to, and how they did last."""
        self._down: Counter[str] = Counter()
        self._frozen: Counter[str] = Counter()
        self._cut: Counter[tuple[str, str]] = Counter()
        self._slow_links: Counter[tuple[str, str]] = Counter()
        self._slow_devices: Counter[str] = Counter()
        self._guests: set[str] = set()
        """Nodes that the file does not name, and that have joined or try to."""
        self._drains: dict[str, list[asyncio.Task[None]]] = {}
        self._behind: set[asyncio.Task[None]] = set()
        self._supervising = True

    # -- processes

    def kill_for_now(self, *names: str) -> None:
        """Kill nodes, which stay away until `restart`."""
        for name in names:
            self._down[name] += 1
            if self.is_running(name):
                self.kill(name)

    def stop_for_now(self, *names: str) -> None:
        """Tell nodes to stop; they stay away until `restart`."""
        for name in names:
            self._down[name] += 1
            if self.is_running(name):
                self._start_behind(self.stop(name))

    def restart(self, *names: str) -> None:
        """Start nodes again when nothing else keeps them away."""
        for name in names:
            self._down[name] -= 1
            self._revive(name)

    def drain(self, name: str) -> None:
        """Ask the front to let a memory node leave, which it may refuse; `replace` starts the node again."""
        self._drains.setdefault(name, []).append(self._start_behind(self._drain(name)))

    def replace(self, name: str) -> None:
        """Stop a node, wherever it is with leaving, and start it again."""
        for asking in self._drains.pop(name, ()):  # a front that is found later would let the new process leave
            asking.cancel()
        self.stop_for_now(name)
        self.restart(name)

    def welcome(self, name: str) -> None:
        """Start a guest, a node that asks the front to be taken in, until it has left by one of the next three."""
        self._guests.add(name)
        self._start_behind(self.join(self._guest(name)))

    def kill_guest(self, name: str) -> None:
        self._guests.remove(name)
        if self.is_running(name):
            self.kill(name)

    def stop_guest(self, name: str) -> None:
        self._start_behind(self._leave(name, drains=False))

    def drain_guest(self, name: str) -> None:
        """Let a memory node leave in order, or kill it where the front cannot let it."""
        self._start_behind(self._leave(name, drains=True))

    def freeze(self, name: str) -> None:
        """The process stands still until `thaw`."""
        self._frozen[name] += 1
        self.world.network.freeze(name)

    def thaw(self, name: str) -> None:
        self._frozen[name] -= 1
        if not self._frozen[name]:
            self.world.network.thaw(name)

    def slow_device(self, name: str) -> None:
        """Every operation takes so much longer until `hasten_device`."""
        self._slow_devices[name] += 1

    def hasten_device(self, name: str) -> None:
        self._slow_devices[name] -= 1

    # -- the network

    def cut(self, name: str, other: str, *, one_way: bool) -> None:
        """Nothing passes between two processes until `mend`, or nothing that the first one sends."""
        self._cut[name, other] += 1
        if not one_way:
            self._cut[other, name] += 1
        self._set_cuts(name, other)

    def mend(self, name: str, other: str, *, one_way: bool) -> None:
        self._cut[name, other] -= 1
        if not one_way:
            self._cut[other, name] -= 1
        self._set_cuts(name, other)

    def slow_link(self, name: str, other: str) -> None:
        """What passes between two processes takes so much longer until `hasten_link`."""
        self._slow_links[name, other] += 1
        self.world.network.slow(name, other, SLOW_TIMES)

    def hasten_link(self, name: str, other: str) -> None:
        self._slow_links[name, other] -= 1
        if not self._slow_links[name, other]:
            self.world.network.slow(name, other, 1.0)

    # -- all of it

    @property
    def is_well(self) -> bool:
        """Whether no node is troubled, all run, and no guest is there."""
        return (
            not self._guests
            and all(self.is_running(node.name) and not self.is_told(node.name) for node in self.config.node)
            and not any(any(trouble.values()) for trouble in (self._down, self._frozen, self._cut, self._slow_links))
        )

    def end_supervision(self) -> None:
        """Start nothing again from now on."""
        self._supervising = False

    # -- inside

    def _seconds_of(self, node: NodeConfig) -> Callable[[str, Place | None], float]:
        usual = seconds(node)
        slow = self._slow_devices
        return lambda name, at: usual(name, at) * (SLOW_TIMES if slow[node.name] else 1.0)

    def _set_cuts(self, name: str, other: str) -> None:
        network = self.world.network
        network.mend(name, other)
        for one, two in ((name, other), (other, name)):
            if self._cut[one, two]:
                network.cut(one, two, one_way=True)

    async def _drain(self, name: str) -> None:
        with suppress(LaminaError):
            await drained(self.config, name, DRAIN_PATIENCE_S, lambda text: None, network=self.world.network)

    def _guest(self, name: str) -> NodeConfig:
        port = int(name.lstrip("rg"))
        if name.startswith("r"):
            return ComputeNodeConfig(name=name, address=Address("tcp", "127.0.0.1", port))
        return MemoryNodeConfig(
            name=name, address=Address("tcp", "127.0.0.1", port), memory=self.config.memory_nodes[0].memory
        )

    async def _leave(self, name: str, *, drains: bool) -> None:
        try:
            async with asyncio.timeout(LEAVE_S):
                if drains:
                    await drained(self.config, name, DRAIN_PATIENCE_S, lambda text: None, network=self.world.network)
                self._guests.discard(name)
                if self.is_running(name):
                    await self.stop(name)
        except (LaminaError, TimeoutError):
            self._guests.discard(name)
            if self.is_running(name):
                self.kill(name)

    def _revive(self, name: str) -> None:
        is_known = name in self._guests or any(node.name == name for node in self.config.node)
        if is_known and self._supervising and not self._down[name] and not self.is_running(name):
            self._start_behind(self.start(name))

    def _start_behind(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)
        return task

    def on_end(self, name: str, *, told: bool) -> None:
        """See `SimCluster.on_end`."""
        if not told and self._supervising and name not in self._joining:
            self.by_themselves[name] = self.ended[name]
        self.world.loop.call_later(0.0 if told else RESTART_S, self._revive, name)


# -- how long


class Lasting(NamedTuple):
    """How long faults of a kind last: a choice of so many seconds at most, where None stands for good."""

    most_s: tuple[float | None, ...]

    def draw(self, chance: Random) -> float | None:
        most = chance.choice(self.most_s)
        return None if most is None else most * chance.uniform(0.1, 1.0)


OUTAGE = Lasting((0.02, 0.02, 0.3, 0.3, 3.0, 3.0, 30.0, None))
"""Of a process: restarted at once, or after a while, or when its peers have gone on without it, or never."""
SILENCE = Lasting((0.02, 0.3, 3.0, 3.0, 30.0, None))
SPELL = Lasting((0.02, 0.3, 3.0))


# -- whom

Choose = Callable[[Nodes, Random], tuple[str, ...]]
"""Returns whom a fault befalls; nobody if the cluster has no such nodes."""


def _one_of(names: tuple[str, ...], chance: Random) -> tuple[str, ...]:
    return (chance.choice(names),) if names else ()


def _memory(nodes: Nodes, chance: Random) -> tuple[str, ...]:
    return _one_of(nodes.memory, chance)


def _follower(nodes: Nodes, chance: Random) -> tuple[str, ...]:
    return _one_of(nodes.compute[1:], chance)


def _front(nodes: Nodes, chance: Random) -> tuple[str, ...]:
    return nodes.compute[:1]


def _any(nodes: Nodes, chance: Random) -> tuple[str, ...]:
    return _one_of(nodes.all, chance)


def _all(nodes: Nodes, chance: Random) -> tuple[str, ...]:
    return nodes.all


def _pair(nodes: Nodes, chance: Random) -> tuple[str, ...]:
    """Two that have a link; memory nodes have one with each other while blocks move."""
    one, other = chance.sample(nodes.all, 2)
    return one, other


def _directed_pair(nodes: Nodes, chance: Random) -> tuple[str, ...]:
    pair = _pair(nodes, chance)
    return pair if chance.random() < 0.5 else pair[::-1]


def _new_memory(nodes: Nodes, chance: Random) -> tuple[str, ...]:
    return (f"g{chance.randrange(9000, 9999)}",)


def _new_replica(nodes: Nodes, chance: Random) -> tuple[str, ...]:
    return (f"r{chance.randrange(9000, 9999)}",)


def _new(nodes: Nodes, chance: Random) -> tuple[str, ...]:
    return chance.choice((_new_memory, _new_replica))(nodes, chance)


# -- what

Change = Callable[[Troubled, tuple[str, ...]], None]


@dataclass(frozen=True)
class Kind:
    """A kind of fault: whom it befalls, and how it begins and ends."""

    name: str
    choose: Choose
    begin: Change
    end: Change
    lasts: Lasting = OUTAGE
    stalls: bool = False
    """Whether it lasts less than the ``peer_timeout`` of the case, so that nobody is lost."""

    @property
    def group(self) -> str:
        return self.name.partition(".")[0]

    @property
    def is_outage(self) -> bool:
        """Whether nodes of the file may be lost."""
        return not (self.stalls or self.group in ("slow", "join"))

    @property
    def is_drained(self) -> bool:
        """Whether a node may finish its work first."""
        return self.name.endswith((".stop", ".drain"))

    def draw(self, nodes: Nodes, chance: Random, within_s: float, peer_timeout: float) -> Fault | None:
        """A fault of this kind in the first seconds of a run."""
        who = self.choose(nodes, chance)
        lasts_s = 0.9 * peer_timeout * chance.random() if self.stalls else self.lasts.draw(chance)
        at_s = within_s * chance.random()
        return Fault(self.name, at_s, who, lasts_s) if who else None


def _kill(cluster: Troubled, who: tuple[str, ...]) -> None:
    cluster.kill_for_now(*who)


def _stop(cluster: Troubled, who: tuple[str, ...]) -> None:
    cluster.stop_for_now(*who)


def _restart(cluster: Troubled, who: tuple[str, ...]) -> None:
    cluster.restart(*who)


def _freeze(cluster: Troubled, who: tuple[str, ...]) -> None:
    cluster.freeze(*who)


def _thaw(cluster: Troubled, who: tuple[str, ...]) -> None:
    cluster.thaw(*who)


def _drain(cluster: Troubled, who: tuple[str, ...]) -> None:
    cluster.drain(*who)


def _replace(cluster: Troubled, who: tuple[str, ...]) -> None:
    cluster.replace(*who)


def _cut(cluster: Troubled, who: tuple[str, ...]) -> None:
    cluster.cut(*who, one_way=False)


def _mend(cluster: Troubled, who: tuple[str, ...]) -> None:
    cluster.mend(*who, one_way=False)


def _cut_one_way(cluster: Troubled, who: tuple[str, ...]) -> None:
    cluster.cut(*who, one_way=True)


def _mend_one_way(cluster: Troubled, who: tuple[str, ...]) -> None:
    cluster.mend(*who, one_way=True)


def _of_process(group: str, choose: Choose, **options: Any) -> list[Kind]:
    return [
        Kind(f"{group}.kill", choose, _kill, _restart, **options),
        Kind(f"{group}.stop", choose, _stop, _restart, **options),
    ]


KINDS = {
    kind.name: kind
    for kind in (
        Kind("slow.device", _any, lambda c, who: c.slow_device(*who), lambda c, who: c.hasten_device(*who), SPELL),
        Kind("slow.link", _pair, lambda c, who: c.slow_link(*who), lambda c, who: c.hasten_link(*who), SPELL),
        Kind("stall.freeze", _any, _freeze, _thaw, stalls=True),
        Kind("stall.cut", _pair, _cut, _mend, stalls=True),
        Kind("stall.one-way", _directed_pair, _cut_one_way, _mend_one_way, stalls=True),
        *_of_process("memory", _memory),
        Kind("memory.drain", _memory, _drain, _replace, SILENCE),
        Kind("memory.freeze", _memory, _freeze, _thaw, SILENCE),
        *_of_process("compute", _follower),
        Kind("compute.freeze", _follower, _freeze, _thaw, SILENCE),
        *_of_process("front", _front),
        Kind("front.freeze", _front, _freeze, _thaw, SILENCE),
        Kind("network.cut", _pair, _cut, _mend, SILENCE),
        Kind("network.one-way", _directed_pair, _cut_one_way, _mend_one_way, SILENCE),
        *_of_process("all", _all),
        Kind("join.kill", _new, lambda c, who: c.welcome(*who), lambda c, who: c.kill_guest(*who)),
        Kind("join.stop", _new_replica, lambda c, who: c.welcome(*who), lambda c, who: c.stop_guest(*who)),
        Kind("join.drain", _new_memory, lambda c, who: c.welcome(*who), lambda c, who: c.drain_guest(*who)),
    )
}
"""All kinds, by name."""


def kinds_of(names: str) -> list[str]:
    """The kinds of a list like ``memory,network.cut``, of groups and of single ones; ValueError for others."""
    found: list[str] = []
    for name in filter(None, names.split(",")):
        own = [kind.name for kind in KINDS.values() if name in (kind.name, kind.group)]
        if not own:
            known = ", ".join([*dict.fromkeys(kind.group for kind in KINDS.values()), *KINDS])
            raise ValueError(f"no kind of fault is called {name!r}; known: {known}")
        found += [kind for kind in own if kind not in found]
    return found
