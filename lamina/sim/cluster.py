"""A whole cluster on one virtual clock: the real nodes, with devices and a network that are modelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import partial
from random import Random

from lamina.admin import AdminClient
from lamina.attention import BackendFactory
from lamina.client import AsyncClient
from lamina.client.asynchronous import RECONNECT_S
from lamina.client.finder import FrontFinder
from lamina.config import ClusterConfig, MemoryNodeConfig, NodeConfig
from lamina.errors import LaminaError, NodeError
from lamina.node.compute import ComputeNode
from lamina.node.daemon import Serve
from lamina.node.joining import Joining
from lamina.node.memory import MemoryNode
from lamina.node.model import OpenModel
from lamina.node.replica import Replica
from lamina.runtime.host import Host
from lamina.sim.device import Seconds
from lamina.sim.loop import VirtualTask
from lamina.sim.storage import SimDisk
from lamina.sim.world import World
from lamina.transport import Hello, Link
from lamina.wire.admin import Status

ASK_EVERY_S = 0.05
"""Virtual seconds between two questions whether the cluster is ready."""
REACH_S = 60.0
"""Virtual seconds that a node may take to listen."""

NodeSeconds = Callable[[NodeConfig], Seconds]
"""How long the operations of a node's device take."""


def instant(node: NodeConfig) -> Seconds:
    """Operations that take no time."""
    return 0.0


async def _run(serve: Serve, stopping: asyncio.Event) -> None:
    await serve(stopping)


_PROCESS: ContextVar[object] = ContextVar("process", default=None)
"""Which process a task belongs to: the one that made it."""


@dataclass(eq=False)
class _Process:
    """What there is of a node between its start and its end."""

    task: asyncio.Task[None]
    stopping: asyncio.Event
    identity: object
    told: bool = False
    """Whether it was told to stop, or killed."""


class SimCluster:
    """All nodes of a cluster file in one process. They are those that real clusters run, on the loop of ``world``.

    ``open_model`` gives every compute node its model, ``backend`` every memory node its attention, and ``seconds`` says
    how long operations take. ``ended`` says of the nodes that have ended how they did: with None, or an error.
    """

    def __init__(
        self,
        world: World,
        config: ClusterConfig,
        *,
        open_model: OpenModel,
        backend: BackendFactory | None = None,
        seconds: NodeSeconds = instant,
    ) -> None:
        self.world = world
        self.config = config
        self.disk = SimDisk()
        """Where journals are."""
        self.ended: dict[str, BaseException | None] = {}
        self.nodes: dict[str, ComputeNode | MemoryNode | Replica] = {}
        """Those that were started, by name."""
        self._random = Random(world.random.getrandbits(64))  # noqa: S311 - no secret depends on it
        self._open_model = open_model
        self._backend = backend
        self._seconds = seconds
        self._joining: dict[str, NodeConfig] = {}
        """The nodes that the file does not name, by name."""
        self._running: dict[str, _Process] = {}
        """Those that were started and not killed, by name."""
        self._last: dict[str, _Process] = {}

    async def start(self, name: str) -> None:
        """Start one node, also one that has ended before."""
        node = self.find(name)
        device = self.world.device(name, self._seconds(node))
        network = self.world.network
        host = Host(self._random, pid=0, open_log=partial(self.disk.open, process=name))
        options, joins, front = self.config.options(node), name in self._joining, self.config.front.address
        serving: ComputeNode | MemoryNode | Replica
        if isinstance(node, MemoryNodeConfig):
            serving = MemoryNode(node, options, device=device, network=network, backend=self._backend, host=host)
            serve: Serve = serving.serve
            if joins:
                serve = partial(Joining(front, node, network, options).serve, serve)
        elif joins:
            serving = Replica(
                front,
                node,
                self.config.transport,
                options,
                device=device,
                network=network,
                open_model=self._open_model,
                host=host,
            )
            serve = serving.serve
        else:
            serving = ComputeNode(
                self.config, node, device=device, network=network, open_model=self._open_model, host=host
            )
            serve = serving.serve
        stopping = asyncio.Event()
        context, identity = copy_context(), object()
        context.run(_PROCESS.set, identity)
        task = self.world.loop.create_task(_run(serve, stopping), name=name, context=context)
        self.ended.pop(name, None)
        self.nodes[name] = serving
        self._running[name] = self._last[name] = _Process(task, stopping, identity)
        task.add_done_callback(lambda done: self._note_end(name, done))

    async def join(self, node: NodeConfig, *, under: str | None = None) -> None:
        """Start a node that the file does not name, and that asks the front to be taken in, also at later starts. Here
        it is called ``under``, by default as it calls itself."""
        self._joining[under or node.name] = node
        await self.start(under or node.name)

    def find(self, name: str) -> NodeConfig:
        """Return a node of the file, or one that has been told to join."""
        return self._joining.get(name) or self.config.find(name)

    def is_running(self, name: str) -> bool:
        """Return whether a node was started and has not ended; it may have been told to stop."""
        return name in self._running and not self._running[name].task.done()

    def is_told(self, name: str) -> bool:
        """Return whether a node that was started was told to stop, or killed, since."""
        return self._last[name].told

    def _note_end(self, name: str, task: asyncio.Task[None]) -> None:
        if self._last[name].task is task:  # else it was killed, and has been started anew before it was gone
            self.ended[name] = asyncio.CancelledError() if task.cancelled() else task.exception()
            self.on_end(name, told=self._last[name].told)

    def on_end(self, name: str, *, told: bool) -> None:
        """A node has ended as ``ended`` says, by itself unless it was ``told`` to, or killed."""

    async def ready(self, front: str | None = None) -> Status:
        """Wait until the front takes requests, by default the first compute node; its status. The error of a node that
        ends before with one."""
        try:
            async with await self.admin(front or self.config.front.name) as front_node:
                while (status := await front_node.status()).state != "ready":
                    self.check()
                    await asyncio.sleep(ASK_EVERY_S)
                return status
        except LaminaError:
            await asyncio.sleep(ASK_EVERY_S)  # a node closes its links before it ends
            self.check()
            raise

    def check(self) -> None:
        """Raise the error of a node that has ended with one."""
        for name, error in self.ended.items():
            if error is not None:
                raise error if isinstance(error, LaminaError) else NodeError.failed("", name, error)

    async def admin(self, name: str) -> AdminClient:
        """Ask a node."""
        return await AdminClient.connect(
            self.find(name).address,
            self.config.options(),
            name="sim",
            deadline_s=REACH_S,
            network=self.world.network,
        )

    async def status(self, name: str) -> Status:
        """What a node says of itself now."""
        async with await self.admin(name) as node:
            return await node.status()

    @asynccontextmanager
    async def client(self, name: str = "client", *, reconnect_s: float = RECONNECT_S) -> AsyncIterator[AsyncClient]:
        """A client of the front."""
        addresses = [node.address for node in self.config.compute_nodes]
        finder = FrontFinder(
            addresses, Hello("client", name), self.config.options(), connect=self.world.network.connect
        )

        def open_link() -> Awaitable[Link]:
            return finder.find(REACH_S)

        client = AsyncClient(await open_link(), open_link, reconnect_s=reconnect_s)
        try:
            yield client
        finally:
            await client.close()

    def kill(self, name: str) -> None:
        """The node's process is gone, as by a signal that it cannot catch."""
        process = self._running.pop(name)
        process.told = True
        self.world.network.kill(name)
        self.disk.kill(name)
        for task in asyncio.all_tasks():
            if isinstance(task, VirtualTask) and task.context.get(_PROCESS) is process.identity:
                task.cancel()

    async def stop(self, name: str) -> None:
        """Tell a node to stop, and wait until it has."""
        process = self._running[name]
        process.told = True
        process.stopping.set()
        await asyncio.wait((process.task,))

    async def stop_all(self) -> Mapping[str, BaseException | None]:
        """Stop all nodes that run, compute nodes first; how each one ended."""
        for role in ("compute", "memory"):
            nodes = [*self.config.node, *self._joining.values()]
            names = [n.name for n in nodes if n.role == role and n.name in self._running]
            await asyncio.gather(*(self.stop(name) for name in names))
        return self.ended

    async def __aenter__(self) -> SimCluster:
        for node in self.config.node:
            await self.start(node.name)
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [process.task for process in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
