"""Take nodes into a cluster that serves: those that ask for it, and those that are new in its file."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from ipaddress import ip_address

import msgspec

from lamina.config import ClusterConfig, MemoryNodeConfig, NodeConfig, format_size, load, parse_name
from lamina.errors import CapacityError, ConfigError, ConnectError, LaminaError, NotFrontError
from lamina.front.blocks import BlockManager
from lamina.front.members import Members, State, entry_of
from lamina.limits import MAX_COMPUTE
from lamina.node.drains import Drains
from lamina.node.model import BLOCK_TOKENS, ServedModel
from lamina.node.roster import Roster
from lamina.runtime.crossing import Crossing
from lamina.runtime.network import Network
from lamina.transport import Address, Hello, Link
from lamina.wire.geometry import shard_by_heads
from lamina.wire.members import Accepted, Candidate, ClusterFacts, Left, MemberEntry
from lamina.wire.questions import send_unless_gone

log = logging.getLogger("lamina.compute")

REACH_S = 4.0
"""The seconds in which the front has to reach a node that asks to be taken in."""
PATIENCE_S = 60.0
"""The seconds in which the blocks of a memory node that is not in the file any more may move to others."""
LEAST_TOKENS = 256
"""The fewest positions for which a memory node is worth a member: those of a stripe."""
_ALIVE = (State.JOINING, State.SERVING, State.LEAVING)


class Admission:
    """Decides who becomes a member of a cluster that serves, on the node's loop of the front."""

    def __init__(
        self,
        config: ClusterConfig,
        served: ServedModel,
        members: Members,
        roster: Roster,
        drains: Drains,
        blocks: BlockManager,
        device: Crossing,
        network: Network,
    ) -> None:
        """``blocks`` belong to the loop to which ``device`` leads."""
        self._config = config
        """The file as it was last read, but for what needs a restart."""
        self._served = served
        self._members = members
        self._roster = roster
        self._drains = drains
        self._blocks = blocks
        self._there = device
        self._network = network
        self._links: dict[int, Link] = {}
        """Over which nodes have asked that are members now, by member id."""
        self._deciding = asyncio.Lock()
        """Held for one decision after the other, so that each counts the members that there are."""
        self._tasks: set[asyncio.Task[None]] = set()
        roster.on_left, roster.on_expired = self._tell_left, self._let_go

    async def close(self) -> None:
        """Read the file no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- nodes that ask

    async def ask(self, link: Link, asked: Candidate) -> Accepted:
        """Take in the node that asks over ``link``, or tell why not. One that is a member already stays one."""
        async with self._deciding:
            try:
                entry = self._entry_of(asked)
                if self._is_new(entry):
                    await self._require_use(entry, asked.memory)
                if asked.listens:
                    await self._reach(entry)
            except LaminaError as error:
                log.warning("event=not_accepted peer=%s address=%s reason=%r", asked.name, asked.address, str(error))
                return Accepted(error=str(error))
            if self._is_new(entry):
                self._take_in(entry)
            self._links[entry.id] = link
            cluster = self._facts() if entry.role == "compute" else None
            fronts = [str(node.address) for node in self._config.compute_nodes]
            return Accepted(member=entry.id, cluster=cluster, fronts=fronts)

    def _entry_of(self, asked: Candidate) -> MemberEntry:
        """Return the entry under which a node can be a member; a ConfigError says why there is none."""
        name, members = parse_name(asked.name), self._members
        address = Address.parse(asked.address)
        if address.port == 0 or _is_unspecified(address):
            raise ConfigError(f"{address} is no address that other nodes can reach; say with --address where {name} is")
        known = members.find(name)
        if known is not None and (known.role != asked.role or known.id == 0):
            raise ConfigError(
                f"{name} is already the name of a {known.role} node, {known.address}; choose another --name"
            )
        if known is not None and known.address != str(address):
            if name in self._roster.in_file:
                raise ConfigError(f"{name} has the address {known.address} in {self._config.file}, not {address}")
            if (state := members.state(known.id)) in _ALIVE:
                raise ConfigError(
                    f"{name} is the name of a member that is {state.value} at {known.address}; choose another --name"
                )
        for other in members.entries:
            if other.name != name and other.address == str(address):
                raise ConfigError(f"{address} is already the address of {other.name}; choose another --listen")
        if known is not None:
            return msgspec.structs.replace(known, address=str(address))
        id_ = members.id_of(name) if members.has_left(name) else members.free_id(asked.member)
        return MemberEntry(id_, name, asked.role, address=str(address))

    def _is_new(self, entry: MemberEntry) -> bool:
        """Return whether a node still has to become a member, or to become one again."""
        return self._members.find(entry.name) != entry or self._members.state(entry.id) not in _ALIVE

    async def _require_use(self, entry: MemberEntry, nbytes: int) -> None:
        """Raise ConfigError or CapacityError for a node that would be of no use to the cluster."""
        if entry.role == "memory":
            await self._require_room(entry, nbytes)
            return
        if self._served.schedule.first_layers is not None:
            raise ConfigError(
                "the compute nodes of this cluster have layers of their own, so that no other one can join them; give "
                f"{entry.name} its layers in {self._config.file}, and start the cluster again"
            )
        if (count := len(self._members.of_role("compute"))) >= MAX_COMPUTE:
            raise ConfigError(f"the cluster has {count} compute nodes already, and can have {MAX_COMPUTE} at most")

    async def _require_room(self, entry: MemberEntry, nbytes: int) -> None:
        """Raise an error if a memory node with so many bytes cannot have its part of the cache."""
        served, name = self._served, entry.name
        if self._config.pipeline.partition == "heads":
            staying = self._members.in_state("memory", State.JOINING, State.SERVING, State.LOST)
            names = [self._members.entry(m).name for m in staying if m != entry.id]
            shards = shard_by_heads(served.facts.layers, [*names, name])
            each = served.layout(shards[-1].layers).bytes_per_token
            least = served.context
        else:
            each, least = served.bytes_per_token, min(LEAST_TOKENS, served.context)
        tokens = nbytes // (each * BLOCK_TOKENS) * BLOCK_TOKENS
        if tokens < least:
            raise CapacityError(
                f"{name} has {format_size(nbytes)}, which holds {tokens} tokens of {each} bytes; expected at least "
                f"{format_size(least * each)} for {least} tokens"
            )
        if self._config.pipeline.partition != "heads":
            most = await self._there.call(self._blocks.max_context_with, tokens // BLOCK_TOKENS)
            if most < served.context:
                raise CapacityError(
                    f"with {name}, which holds {tokens} tokens, the memory nodes could hold {most} tokens of one "
                    f"request, fewer than the context of {served.context}: stripes of its tokens lie on all nodes, "
                    "and the smallest one counts; give it more memory"
                )

    async def _reach(self, entry: MemberEntry) -> None:
        """Raise an error unless the node answers at its address."""
        hello, options = Hello("monitor", "front"), self._config.options()
        try:
            link = await self._network.connect(Address.parse(entry.address), hello, options, deadline_s=REACH_S)
        except LaminaError as e:
            raise ConnectError(
                f"{entry.name} cannot be reached at {entry.address}: {e}; say with --address where other nodes reach it"
            ) from e
        peer = link.info.peer
        await link.close()
        if (peer.role, peer.name) != (entry.role, entry.name):
            raise ConfigError(
                f"at {entry.address} answers {peer.role} node {peer.name}, not {entry.role} node {entry.name}; say "
                "with --address where other nodes reach it"
            )

    def _take_in(self, entry: MemberEntry) -> None:
        log.info("event=accepted peer=%s role=%s address=%s member=%d", entry.name, entry.role, entry.address, entry.id)
        self._roster.take_in(entry)

    def _facts(self) -> ClusterFacts:
        config = self._config
        return ClusterFacts(
            model=msgspec.structs.replace(config.model, path=str(config.model_path.resolve())),
            pipeline=config.pipeline,
            recovery=config.recovery,
            start_timeout=config.transport.start_timeout,
            members=self._members.entries,
        )

    def _tell_left(self, entry: MemberEntry) -> None:
        if (link := self._links.pop(entry.id, None)) is not None:
            send_unless_gone(link, Left())

    def _let_go(self, entry: MemberEntry) -> None:
        """End the link over which a node has asked that is lost. If it is only cut off from others, it asks again."""
        if (link := self._links.pop(entry.id, None)) is not None:
            link.abort(f"{entry.name} is lost to the cluster, and no member any more")

    # -- the file

    def reload(self) -> None:
        """Read the cluster file again, and take its memory nodes for those of the cluster."""
        task = asyncio.get_running_loop().create_task(self._reload())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reload(self) -> None:
        async with self._deciding:
            before = self._config
            try:
                after = load(before.file)
            except ConfigError as error:
                log.error("event=not_reloaded reason=%r", str(error))
                return
            if changed := _changes(before, after):
                log.warning("event=restart_needed keys=%s", ",".join(changed))
            old, new = ({node.name: node for node in c.memory_nodes} for c in (before, after))
            added = [node for name, node in new.items() if name not in old and await self._add(node)]
            removed = [node for name, node in old.items() if name not in new]
            kept = [*(node for name, node in old.items() if name in new), *added]
            self._set_file([*before.compute_nodes, *kept])
            staying = [node for node in removed if not await self._remove(node.name)]
            self._set_file([*before.compute_nodes, *kept, *staying])
            gone = [node.name for node in removed if node not in staying]
            log.info(
                "event=reloaded file=%s added=%s removed=%s",
                before.file,
                ",".join(node.name for node in added),
                ",".join(gone),
            )

    def _set_file(self, nodes: list[NodeConfig]) -> None:
        self._config = msgspec.structs.replace(self._config, node=nodes)
        self._roster.in_file = {node.name for node in nodes}

    async def _add(self, node: MemoryNodeConfig) -> bool:
        """Take in a memory node that is new in the file; return False if it cannot be one."""
        members, known = self._members, self._members.find(node.name)
        id_ = members.id_of(node.name) if known or members.has_left(node.name) else members.free_id()
        entry = entry_of(id_, node)
        try:
            if known is not None and members.state(known.id) in _ALIVE and known != entry:
                raise ConfigError(f"{node.name} is a member already, at {known.address} and with another quota or role")
            if self._is_new(entry):
                await self._require_room(entry, min(node.memory, node.quota or node.memory))
                self._take_in(entry)
        except LaminaError as error:
            log.error("event=not_accepted peer=%s address=%s reason=%r", node.name, node.address, str(error))
            return False
        return True

    async def _remove(self, name: str) -> bool:
        """Let a memory node leave that is not in the file any more; return False if the cluster needs it."""
        member = self._members.id_of(name)
        if self._members.state(member) not in (State.SERVING, State.LEAVING):
            self._roster.remove(member)
            return True
        try:
            await self._drains.begin(member, PATIENCE_S)
        except LaminaError as error:
            log.error("event=not_removed peer=%s reason=%r", name, str(error))
            return False
        return True


class Door:
    """Is what a compute node has for nodes that would join, and for SIGHUP: only the front that serves opens it."""

    def __init__(self, refusal: Callable[[], NotFrontError | None]) -> None:
        """``refusal`` returns the error where this node is not the front."""
        self._refusal = refusal
        self._admission: Admission | None = None

    def open(self, admission: Admission) -> None:
        """Take nodes in from now on."""
        self._admission = admission

    async def close(self) -> None:
        """Take in no more nodes."""
        if self._admission is not None:
            await self._admission.close()

    async def ask(self, link: Link, asked: Candidate) -> Accepted:
        """Answer a node that asks over ``link``."""
        if (refusal := self._refusal()) is not None:
            return Accepted(error=str(refusal), fronts=[refusal.address])
        if self._admission is None:
            return Accepted(error="the front is still starting", is_starting=True)
        return await self._admission.ask(link, asked)

    def reload(self) -> None:
        """Read the cluster file again, if this is the front: see `Admission.reload`."""
        if self._admission is not None:
            self._admission.reload()
            return
        reason = "the front is still starting" if self._refusal() is None else "only the front reads the file again"
        log.warning("event=not_reloaded reason=%r", reason)


def _changes(before: ClusterConfig, after: ClusterConfig) -> list[str]:
    """Return what differs in a file besides the memory nodes that it has: keys, and nodes."""
    found = []
    for section in ("model", "pipeline", "transport", "recovery", "log"):
        one, other = getattr(before, section), getattr(after, section)
        found += [f"{section}.{key}" for key in one.__struct_fields__ if getattr(one, key) != getattr(other, key)]
    if before.links.secret != after.links.secret and "transport.secret_file" not in found:
        found.append("transport.secret_file")
    if [node.name for node in before.compute_nodes] != [node.name for node in after.compute_nodes]:
        found.append("compute nodes")
    old = {node.name: node for node in before.node}
    for node in after.node:
        if (known := old.get(node.name)) is not None and known != node:
            keys = [k for k in node.__struct_fields__ if getattr(known, k, None) != getattr(node, k)]
            found.append(f"{node.name}.{'+'.join(keys) or 'role'}")
    return found


def _is_unspecified(address: Address) -> bool:
    try:
        return ip_address(address.host).is_unspecified
    except ValueError:
        return False
