"""Ask a running node for its status, traces and measurements, as `lamina up`, `doctor`, `trace` and benchmarks do."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Literal, Self

from lamina.client.finder import FrontFinder
from lamina.config import ClusterConfig
from lamina.errors import TransportError
from lamina.runtime.network import Network
from lamina.runtime.sockets import Sockets
from lamina.transport import Address, Hello, Link, Options
from lamina.wire.admin import AskSpans, AskStatus, Drain, Draining, Probe, Probed, Record, Spans, Status
from lamina.wire.codec import Message, decode
from lamina.wire.questions import Questions


async def connect_to_front(
    config: ClusterConfig, *, name: str, deadline_s: float, network: Network | None = None
) -> AdminClient:
    """Reach the compute node that is the front of a cluster, within ``deadline_s`` seconds; ``name`` appears in the
    logs. Errors are those of `FrontFinder.find`.
    """
    addresses = [node.address for node in config.compute_nodes]
    connect = (network or Sockets()).connect
    finder = FrontFinder(addresses, Hello("monitor", name), config.options(), connect=connect)
    return AdminClient(await finder.find(deadline_s))


class AdminClient:
    """Asks one node over a link. Every method raises TransportError if the node is lost."""

    def __init__(self, link: Link) -> None:
        """Nothing may be delivered from ``link`` yet."""
        self._link = link
        self._questions = Questions(link)
        link.deliver(on_message=self._on_message, on_lost=self._on_lost)

    @classmethod
    async def connect(
        cls, address: Address, options: Options, *, name: str, deadline_s: float, network: Network | None = None
    ) -> AdminClient:
        """Reach the node at ``address`` within ``deadline_s`` seconds; raise ConnectError if it does not answer.

        ``name`` appears in the node's log, and ``options`` have the kind "control".
        """
        network = network or Sockets()
        return cls(await network.connect(address, Hello("monitor", name), options, deadline_s=deadline_s))

    @property
    def peer(self) -> Hello:
        """Return what the node said about itself when the link was made."""
        return self._link.info.peer

    async def status(self) -> Status:
        """Return the node's state and counters."""
        status: Status = await self._questions.ask(AskStatus(), Status)
        return status

    async def record(self, seconds: float) -> None:
        """Have the node record what its device does, for so many seconds from now."""
        await self._questions.ask(Record(seconds=seconds), Spans)

    async def spans(self, count: int) -> Spans:
        """Stop the recording, and return the oldest ``count`` spans that were not given out yet."""
        spans: Spans = await self._questions.ask(AskSpans(count=count), Spans)
        return spans

    async def probe(self, node: str, kind: Literal["rdma", "shm", "tcp"]) -> Probed:
        """Have a compute node measure its link to a memory node of its file, over one transport."""
        probed: Probed = await self._questions.ask(Probe(node=node, kind=kind), Probed)
        return probed

    async def drain(self, node: str, patience_s: float | None) -> Draining:
        """Have the front let a memory node leave, or tell how far that is; see `lamina.wire.admin.Drain`."""
        draining: Draining = await self._questions.ask(Drain(node=node, patience=patience_s), Draining)
        return draining

    async def close(self) -> None:
        """Close the link."""
        await self._link.close()

    def abort(self, reason: str) -> None:
        """End the link at once."""
        self._link.abort(reason)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _on_message(self, plain: dict[str, Any]) -> None:
        message: Message = decode(plain, Status | Spans | Probed | Draining)
        self._questions.answer(message, type(message))

    def _on_lost(self, error: TransportError) -> None:
        self._questions.fail(error)
