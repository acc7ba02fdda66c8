"""Run a replica that no cluster file names: it learns from the front what it is a replica of."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from lamina.config import ClusterConfig, ComputeNodeConfig, TransportConfig
from lamina.node.compute import ComputeNode
from lamina.node.joining import Joining
from lamina.node.model import OpenModel, open_checkpoint
from lamina.runtime.device import Device
from lamina.runtime.host import Host
from lamina.runtime.network import Network
from lamina.transport import Address, Options
from lamina.wire.members import ClusterFacts


class Replica:
    """Runs the compute node ``node`` as a replica of the cluster whose front has the address ``front``.

    ``transport`` and ``links`` say how it makes links; all else is as for a `ComputeNode`.
    """

    def __init__(
        self,
        front: Address,
        node: ComputeNodeConfig,
        transport: TransportConfig,
        links: Options,
        *,
        device: Device,
        network: Network,
        open_model: OpenModel = open_checkpoint,
        host: Host | None = None,
    ) -> None:
        self._node = node
        self._transport = transport
        self._links = links
        self._device = device
        self._network = network
        self._open_model = open_model
        self._host = host
        self._joining = Joining(front, node, network, links)

    async def serve(self, stopping: asyncio.Event) -> None:
        """Be taken in and serve; when ``stopping`` is set, leave in order. Errors are those of `Joining.run`, and of
        the node itself."""
        asking, stopped = asyncio.ensure_future(self._joining.introduce()), asyncio.ensure_future(stopping.wait())
        try:
            await asyncio.wait((asking, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                return
            facts = asking.result()
        finally:
            asking.cancel()
            stopped.cancel()
        node = ComputeNode(
            self._config(facts),
            self._node,
            device=self._device,
            network=self._network,
            open_model=self._open_model,
            host=self._host,
            entries=facts.members,
        )
        await self._joining.serve(node.serve, stopping)

    def _config(self, facts: ClusterFacts) -> ClusterConfig:
        """Return what the file of the cluster would say to this node."""
        front = min((entry for entry in facts.members if entry.role == "compute"), key=lambda entry: entry.id)
        return ClusterConfig(
            model=facts.model,
            node=[ComputeNodeConfig(name=front.name, address=Address.parse(front.address)), self._node],
            pipeline=facts.pipeline,
            transport=msgspec.structs.replace(self._transport, start_timeout=facts.start_timeout),
            recovery=facts.recovery,
            file=Path(f"the cluster of {front.name}"),
            links=self._links,
        )
