"""Become a member of a running cluster whose file does not name this node."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Iterable
from typing import Any, Never

import msgspec

from lamina.config import MemoryNodeConfig, NodeConfig
from lamina.errors import ConfigError, ConnectError, HandshakeError, LaminaError, TransportError
from lamina.node.daemon import Serve
from lamina.runtime.network import Network
from lamina.transport import Address, Hello, Link, Options
from lamina.wire.codec import decode
from lamina.wire.members import Accepted, Candidate, ClusterFacts, Left
from lamina.wire.questions import Questions

log = logging.getLogger("lamina.node")

ROLE = "candidate"
"""The role of a node that asks to be taken in."""
REACH_S = 60.0
"""The seconds in which the front has to be reached at the first time."""
AGAIN_S = 4.0
"""The seconds in which a node has to be reached later, where several can be the front."""
PAUSE_S = 1.0
"""The seconds between two attempts, while the front is starting or lost."""


class Joining:
    """Has the front of a cluster take ``node`` in, and again whenever the link to it was lost.

    Then another compute node may be the front.
    """

    def __init__(self, front: Address, node: NodeConfig, network: Network, options: Options) -> None:
        """``front`` is the address of a compute node of the cluster's file. ``options`` are those of the node's
        links."""
        self._fronts = [front]
        """The compute nodes that may be the front; the first one is asked next."""
        memory = node.memory if isinstance(node, MemoryNodeConfig) else 0
        self._candidate = Candidate(name=node.name, role=node.role, address=str(node.address), memory=memory)
        self._network = network
        self._options = dataclasses.replace(options, kind="control")

    async def introduce(self) -> ClusterFacts:
        """Have the front say what it is to be a replica of. Errors are those of `run`."""
        meeting = await self._meet(msgspec.structs.replace(self._candidate, listens=False))
        await meeting.link.close()
        assert meeting.accepted.cluster is not None, "as the front tells a replica"
        return meeting.accepted.cluster

    async def run(self, stopping: asyncio.Event) -> None:
        """Be a member until the front says that this node has left, or ``stopping`` is set.

        Raises ConnectError, HandshakeError or ConfigError if the front cannot be reached, is none, or does not take
        this node in. After the first time it is asked again in that case, unless it has given the node's id away.
        """
        is_first = True
        while not stopping.is_set():
            try:
                meeting = await self._meet(self._candidate)
            except LaminaError as error:
                if is_first or isinstance(error, _ReplacedError):
                    raise
                log.warning("event=not_joined peer=%s reason=%r", self._front, str(error))
                if isinstance(error, ConnectError):
                    self._fronts.append(self._fronts.pop(0))
                await asyncio.sleep(PAUSE_S)
                continue
            is_first = False
            try:
                has_left = await meeting.ended
            finally:
                await meeting.link.close()
            if has_left:
                log.info("event=left peer=%s", self._front)
                return
            log.warning("event=front_lost reason=%r", meeting.reason)

    async def serve(self, serve: Serve, stopping: asyncio.Event) -> None:
        """Run this node, as ``serve`` does, and have it taken in meanwhile. It ends with the error of either."""
        serving = asyncio.ensure_future(serve(stopping))
        staying = asyncio.ensure_future(self.run(stopping))
        try:
            await asyncio.wait((serving, staying), return_when=asyncio.FIRST_COMPLETED)
            if staying.done():
                staying.result()
            await serving
        finally:
            for task in (serving, staying):
                task.cancel()
            await asyncio.gather(serving, staying, return_exceptions=True)

    @property
    def _front(self) -> Address:
        return self._fronts[0]

    def _turn_to(self, told: Iterable[str]) -> None:
        """Ask the nodes at these addresses first."""
        self._fronts = list(dict.fromkeys((*map(Address.parse, told), *self._fronts)))

    async def _meet(self, candidate: Candidate) -> _Meeting:
        """Be taken in by the front, for which it may have to become ready first, or to be found."""
        while True:
            link = await self._connect()
            meeting = _Meeting(link)
            try:
                accepted = await meeting.ask(candidate)
            except TransportError as e:
                raise ConnectError(f"--join: the front at {self._front} was lost: {e}") from e
            if not accepted.error:
                break
            await link.close()
            if not (accepted.is_starting or accepted.fronts):
                self._refused(accepted.error, link)
            log.info("event=not_joined peer=%s reason=%r", self._front, accepted.error)
            self._turn_to(accepted.fronts)
            await asyncio.sleep(PAUSE_S)
        if candidate.member not in (None, accepted.member) and candidate.role == "compute":
            link.abort("it has another id now")
            raise _ReplacedError(
                f"--join: {link.info.peer.name} at {self._front} knew {candidate.name} as member {candidate.member}, "
                "which is another node now; start it again"
            )
        self._candidate = msgspec.structs.replace(self._candidate, member=accepted.member)
        self._turn_to([str(self._front), *accepted.fronts])
        peer = link.info.peer.name
        if candidate.listens:
            log.info("event=member_of peer=%s address=%s member=%d", peer, self._front, accepted.member)
        return meeting

    def _refused(self, reason: str, link: Link) -> Never:
        raise ConfigError(
            f"--join: {link.info.peer.name} at {self._front} does not take in {self._candidate.name}: {reason}"
        )

    async def _connect(self) -> Link:
        hello, deadline_s = Hello(ROLE, self._candidate.name), REACH_S if len(self._fronts) == 1 else AGAIN_S
        log.info("event=waiting peer=%s deadline_s=%g", self._front, deadline_s)
        try:
            link = await self._network.connect(self._front, hello, self._options, deadline_s=deadline_s)
        except ConnectError as e:
            raise ConnectError(
                f"--join: no front could be reached at {self._front} within {deadline_s:g} s: {e}"
            ) from e
        except TransportError as e:
            raise HandshakeError(f"--join: {self._front} is no front that this node can join: {e}") from e
        peer = link.info.peer
        if peer.role != "compute":
            await link.close()
            raise HandshakeError(
                f"--join: at {self._front} answers a {peer.role} node, {peer.name}; expected the front of a cluster, "
                "or another compute node of its file"
            )
        return link


class _ReplacedError(ConfigError):
    """The front has given the id of this node to another one; a replica cannot change its own."""


class _Meeting:
    """A link to the front. ``ended`` is done when it has ended, and says whether this node has left the cluster."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.reason = ""
        self.accepted = Accepted()
        self._questions = Questions(link)
        link.deliver(on_message=self._on_message, on_lost=self._on_lost)

    async def ask(self, candidate: Candidate) -> Accepted:
        self.accepted = await self._questions.ask(candidate)
        return self.accepted

    def _on_message(self, plain: dict[str, Any]) -> None:
        message = decode(plain, Accepted | Left)
        if isinstance(message, Accepted):
            self._questions.answer(message)
        elif not self.ended.done():
            self.ended.set_result(True)

    def _on_lost(self, error: TransportError) -> None:
        self.reason = str(error)
        self._questions.fail(error)
        if not self.ended.done():
            self.ended.set_result(False)
