"""What ``rdma`` needs of verbs: a port, memory registered with it, and queue pairs. A thin layer over pyverbs.

pyverbs is optional, and comes in versions that differ: 44 is Debian 12's, 59 the newest known. It frees no work request
by itself, so they are made once and used again where that is possible, and closed where it is not.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import functools
import importlib
import ipaddress
import mmap
import os
import resource
import threading
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lamina.errors import CapacityError, TransportError
from lamina.transport.base import address_of
from lamina.transport.lanes import UpgradeError
from lamina.transport.options import MTUS, RdmaOptions

MAX_GATHER = 30
"""Pieces of memory that one request may gather; more does not fit into a request of common devices."""
MAX_REQUEST_BYTES = 1 << 20
"""Of one request: so progress shows on a slow network too."""
INLINE_BYTES = (256, 64, 0)
"""Bytes that a request may carry in itself: the first that the device grants."""

COPY_BYTES = 16 << 10
"""Up to here a source from anywhere is copied to memory that is registered; registering a larger one costs less."""

RETRIES = 7
"""After a packet that is not acknowledged. Soft-RoCE takes it for no limit, and with any other gives up where a few
percent are lost; so whoever uses a queue pair has to watch for progress."""
ACK_TIMEOUT_UNIT_S = 4.096e-6
MAX_ACK_TIMEOUT = 17
"""0.54 s. Some losses cost as much, so it does not grow with ``peer_timeout`` for ever."""
RNR_RETRIES = 7
"""Without end: credits see to it that a receive is posted."""
MIN_RNR_TIMER = 1
"""0.01 ms."""
HOP_LIMIT = 64

MIN_MEMLOCK = 64 << 20
"""Bytes. A node whose limit of locked memory is lower could not register what it exposes."""
_CAP_IPC_LOCK = 14


@functools.cache
def pyverbs() -> Any:
    """Those names of pyverbs that are used here. UpgradeError where it cannot be had."""
    try:
        from pyverbs import addr, cq, device, mr, pd, pyverbs_error, qp, wr

        try:
            enums: Any = importlib.import_module("pyverbs.libibverbs_enums")
        except ModuleNotFoundError:
            enums = importlib.import_module("pyverbs.enums")  # before version 56
    except ModuleNotFoundError as error:
        raise UpgradeError(
            "pyverbs is not installed: pip install 'lamina[rdma]', or on Debian and Ubuntu apt install python3-pyverbs "
            "and link /usr/lib/python3/dist-packages/pyverbs into this environment"
        ) from error
    except ImportError as error:
        raise UpgradeError(
            f"pyverbs does not fit this machine's libibverbs ({error}): both must come from the same version of "
            "rdma-core, so take both from the distribution, or build pyverbs from that version"
        ) from error
    return SimpleNamespace(
        e=enums,
        Error=pyverbs_error.PyverbsError,
        GID=addr.GID,
        AHAttr=addr.AHAttr,
        GlobalRoute=addr.GlobalRoute,
        CQ=cq.CQ,
        CompChannel=cq.CompChannel,
        Context=device.Context,
        get_device_list=device.get_device_list,
        MR=mr.MR,
        PD=pd.PD,
        QP=qp.QP,
        QPAttr=qp.QPAttr,
        QPCap=qp.QPCap,
        QPInitAttr=qp.QPInitAttr,
        SGE=wr.SGE,
        RecvWR=wr.RecvWR,
        SendWR=wr.SendWR,
    )


# -- ports


@dataclass(frozen=True)
class Port:
    """A port that can be used, and how the peer addresses it: what an end says of itself."""

    device: str
    port: int
    link_layer: str
    """``ethernet`` (RoCE v2) or ``infiniband``."""
    gid: str
    gid_index: int
    lid: int
    mtu: int
    """Bytes."""

    @classmethod
    def from_offer(cls, offer: dict[str, Any]) -> Port:
        """Check what the peer offered; raises UpgradeError."""
        match offer:
            case {
                "device": str(device),
                "port": int(port),
                "link_layer": "ethernet" | "infiniband" as link_layer,
                "gid": str(gid),
                "gid_index": int(gid_index),
                "lid": int(lid),
                "mtu": int(mtu),
            } if 0 < port < 256 and 0 <= gid_index < 2**16 and 0 <= lid < 2**16 and mtu in MTUS:
                with contextlib.suppress(ValueError):
                    return cls(device, port, link_layer, ipaddress.IPv6Address(gid).exploded, gid_index, lid, mtu)
        raise UpgradeError(f"the peer offered something else than a port: {offer!r:.200}")

    @property
    def place(self) -> str:
        """The GID as people know it, for messages: an IPv4 address where it is one."""
        address = ipaddress.IPv6Address(self.gid)
        return str(address.ipv4_mapped or address)


def find_port(wanted: RdmaOptions) -> Port:
    """The first port that fits; UpgradeError says what is wrong with those that there are."""
    verbs = pyverbs()
    try:
        names = [device.name.decode() for device in verbs.get_device_list()]
    except verbs.Error:
        names = []
    if not names:
        raise UpgradeError("this machine has no RDMA device: check `rdma link`, and that the device's driver is loaded")
    if wanted.device is not None and wanted.device not in names:
        raise UpgradeError(f"there is no RDMA device {wanted.device!r}, only {', '.join(names)}: correct rdma.device")
    reasons: list[str] = []
    for name in [wanted.device] if wanted.device is not None else names:
        try:
            device = open_device(name)
        except UpgradeError as error:
            reasons.append(str(error))
            continue
        for number in [wanted.port] if wanted.port is not None else range(1, device.ports + 1):
            try:
                return _usable(device, number, wanted)
            except UpgradeError as error:
                reasons.append(str(error))
    raise UpgradeError("; ".join(reasons))


def _usable(device: Device, number: int, wanted: RdmaOptions) -> Port:
    """The port if it can be used; UpgradeError if not."""
    e = pyverbs().e
    where = f"RDMA device {device.name}"
    if not 1 <= number <= device.ports:
        raise UpgradeError(f"{where} has no port {number}, only 1 to {device.ports}: correct rdma.port")
    where += f" port {number}"
    port = device.context.query_port(number)
    if port.state != e.IBV_PORT_ACTIVE:
        state = {e.IBV_PORT_DOWN: "down", e.IBV_PORT_INIT: "initialising", e.IBV_PORT_ARMED: "armed"}
        raise UpgradeError(
            f"{where} is {state.get(port.state, f'in state {port.state}')}, not active: check cable, "
            "switch and `ip link`, and on InfiniBand the subnet manager"
        )
    ethernet = port.link_layer == e.IBV_LINK_LAYER_ETHERNET
    mtu = MTUS[port.active_mtu - 1]
    if wanted.mtu is not None and wanted.mtu > mtu:
        raise UpgradeError(f"{where} has an MTU of {mtu} bytes, and rdma.mtu demands {wanted.mtu}: lower it, or raise "
                           "the MTU of the network")  # fmt: skip
    gids = {
        entry.gid_index: ipaddress.IPv6Address(device.context.query_gid(number, entry.gid_index).gid)
        for entry in device.context.query_gid_table(port.gid_tbl_len * device.ports)
        if entry.port_num == number and entry.gid_type == (e.IBV_GID_TYPE_ROCE_V2 if ethernet else e.IBV_GID_TYPE_IB)
    }
    if wanted.gid_index is not None:
        index = wanted.gid_index
    elif ethernet:
        index = min(gids, key=lambda i: (gids[i].ipv4_mapped is None, gids[i].is_link_local, i), default=0)
    else:
        index = 0
    if index not in gids:
        kind = "RoCE v2" if ethernet else "InfiniBand"
        there = ", ".join(f"{i} ({gid.ipv4_mapped or gid})" for i, gid in gids.items()) or "none"
        raise UpgradeError(
            f"{where} has no {kind} GID of index {index}; of this kind it has: {there}; "
            "correct rdma.gid_index, or give the interface an address"
        )
    return Port(
        device.name,
        number,
        "ethernet" if ethernet else "infiniband",
        gids[index].exploded,
        index,
        port.lid,
        wanted.mtu or mtu,
    )


# -- devices and memory

MemoryKey = tuple[int, int, bool]
"""Address, bytes, and whether peers may write there."""


class Memory:
    """Registered memory of this process. Whoever acquired it releases it."""

    __slots__ = ("_keep", "_key", "_mr", "address", "end", "lkey", "owner", "rkey", "users")

    def __init__(self, mr: Any, key: MemoryKey, keep: object, owner: weakref.ref[mmap.mmap] | None) -> None:
        self._mr = mr
        self._key = key
        self._keep = keep
        """What must not be unmapped meanwhile."""
        self.owner = owner
        """The mapping with whose end the registration ends too; None if it is kept."""
        self.address = key[0]
        self.end = key[0] + key[1]
        self.lkey: int = mr.lkey
        self.rkey: int = mr.rkey
        self.users = 1

    @property
    def alive(self) -> bool:
        return self._mr is not None

    def holds(self, owner: object) -> bool:
        """Whether what lies at these addresses and belongs to ``owner`` is what was registered."""
        return self._mr is not None and (self.owner is None or self.owner() is owner)

    def close(self) -> None:
        if self._mr is not None:
            mr, self._mr, self._keep, self.owner = self._mr, None, None, None
            with contextlib.suppress(pyverbs().Error):
                mr.close()


class Device:
    """An open device: one context and one protection domain in a process, and all memory registered with them.

    Links share registrations, so memory is pinned once however many peers may write it. A peer that learns the key of a
    region that is exposed to another peer could write it too: the nodes of a cluster trust each other that far.
    """

    def __init__(self, name: str) -> None:
        verbs = pyverbs()
        try:
            self.context = verbs.Context(name=name)
            self.pd = verbs.PD(self.context)
            attributes = self.context.query_device()
        except verbs.Error as error:
            raise UpgradeError(
                f"RDMA device {name} cannot be opened ({error}): check that this user may open /dev/infiniband/uverbs*"
            ) from error
        self.name = name
        self._pid = os.getpid()
        self.ports: int = attributes.phys_port_cnt
        self.max_gather = min(attributes.max_sge, MAX_GATHER)
        self.max_queue = min(attributes.max_qp_wr, attributes.max_cqe // 2 - 1)
        self._memories: dict[MemoryKey, Memory] = {}
        self.lock = threading.RLock()
        """Held while registrations change: regions are exposed in one thread and written from in another."""

    def register(self, address: int, nbytes: int, access: int = 0) -> Any:
        """A memory region of verbs, which the caller closes. Raises CapacityError where the memory cannot be locked."""
        verbs = pyverbs()
        try:
            return verbs.MR(self.pd, nbytes, access, address=address)
        except verbs.Error as error:
            what = f"{nbytes} bytes of memory cannot be registered with RDMA device {self.name}"
            if getattr(error, "error_code", None) == errno.ENOMEM:
                raise CapacityError(f"{what}: no more may be locked. {_memlock_advice()}") from error
            raise TransportError(f"{what}: {error}") from error

    def expose(self, view: memoryview) -> Memory:
        """Register memory that peers may write, and keep it."""
        e = pyverbs().e
        key = (address_of(view), view.nbytes, True)
        if memory := self._memories.get(key):
            memory.users += 1
            return memory
        mr = self.register(*key[:2], e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE)
        memory = self._memories[key] = Memory(mr, key, view, None)
        return memory

    def source(self, owner: object, address: int, end: int) -> Memory | None:
        """The registration of memory in which a source lies: one that exists, or of the mapping ``owner`` if it is one.

        The latter ends with the mapping. None: memory from elsewhere, which may be gone and reused at any time.
        """
        for memory in list(self._memories.values()):
            if memory.address <= address and end <= memory.end and memory.holds(owner):
                memory.users += 1
                return memory
        if not isinstance(owner, mmap.mmap):
            return None
        key = (address_of(memoryview(owner)), len(owner), False)
        mr = self.register(*key[:2])
        memory = Memory(mr, key, None, weakref.ref(owner, lambda _: self._forget(memory)))
        self._memories[key] = memory
        return memory

    def close(self) -> None:
        """At the end of the process: pyverbs fails when it is left to the interpreter."""
        if os.getpid() == self._pid:  # what a child has by fork is still the parent's
            with contextlib.suppress(pyverbs().Error):
                self.context.close()  # and all that belongs to it

    def release(self, memory: Memory) -> None:
        memory.users -= 1
        if memory.users == 0:
            self._forget(memory)

    def _forget(self, memory: Memory) -> None:
        with self.lock:
            if self._memories.get(memory._key) is memory:
                del self._memories[memory._key]
            memory.close()


class Holdings:
    """The registrations that one link uses, by address."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._held: list[Memory] = []
        self._index: tuple[list[int], list[Memory]] = [], []
        """Those that lie in no other one, by ascending address, so that their ends ascend too; and these addresses."""

    def expose(self, view: memoryview) -> Memory:
        """See ``Device.expose``."""
        with self.device.lock:
            memory = self.device.expose(view)
            self._hold(memory)
        return memory

    def find(self, owner: object, address: int, nbytes: int) -> int | None:
        """The local key of the memory in which these bytes lie. None if it is not registered, and need not be."""
        end = address + nbytes
        starts, found = self._index
        i = bisect_right(starts, address) - 1
        if i >= 0:
            memory = found[i]
            if end <= memory.end and memory.holds(owner):
                return memory.lkey
        if nbytes <= COPY_BYTES and not isinstance(owner, mmap.mmap):
            return None
        with self.device.lock:
            source = self.device.source(owner, address, end)
            if source is None:
                return None
            self._hold(source)
        return source.lkey

    def _hold(self, memory: Memory) -> None:
        self._held = [held for held in self._held if held.alive]
        self._held.append(memory)
        found: list[Memory] = []
        for held in sorted(self._held, key=lambda held: (held.address, -held.end)):
            if not found or held.end > found[-1].end:
                found.append(held)
        self._index = [held.address for held in found], found

    def close(self) -> None:
        with self.device.lock:
            held, self._held, self._index = self._held, [], ([], [])
            for memory in held:
                if memory.alive:
                    self.device.release(memory)


_devices: dict[tuple[int, str], Device] = {}


def open_device(name: str) -> Device:
    """The device, opened once in a process: what a child inherits by fork cannot be used. Raises UpgradeError."""
    key = (os.getpid(), name)
    if key not in _devices:
        device = _devices[key] = Device(name)
        atexit.register(device.close)
    return _devices[key]


def check_memlock() -> None:
    """Raise UpgradeError where the limit of locked memory is too low for any node."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit != resource.RLIM_INFINITY and limit < MIN_MEMLOCK and not _may_lock():
        raise UpgradeError(f"too little memory may be registered for RDMA. {_memlock_advice()}")


def _memlock_advice() -> str:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    value = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit} bytes"
    return (
        f"RLIMIT_MEMLOCK is {value} here: set LimitMEMLOCK=infinity for the service, or `ulimit -l unlimited`, or "
        "memlock in /etc/security/limits.conf"
    )


def _may_lock() -> bool:
    """Whether this process has CAP_IPC_LOCK, for which the limit does not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False


class _PyBuffer(ctypes.Structure):
    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def address_of_readonly(view: memoryview) -> int:
    """Where the first byte of any contiguous view lies, also one that may not be written."""
    buffer = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), 0)
    try:
        return int(buffer.buf)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))


# -- queue pairs

Piece = tuple[int, int, int]
"""Registered memory to gather from: address, bytes, local key."""


class QueuePair:
    """A reliable connection: a queue pair, its completion queue, and a descriptor that tells of completions."""

    def __init__(self, device: Device, port: Port, queue: int) -> None:
        """Raises UpgradeError; has freed everything then."""
        verbs = pyverbs()
        e = verbs.e
        self.batch = min(queue, device.max_queue) // 4
        """Receives that are posted at once."""
        self.queue = 4 * self.batch
        """Requests that may be under way, and receives that are posted."""
        self.max_gather = device.max_gather
        self.max_bytes = min(device.context.query_port(port.port).max_msg_sz, MAX_REQUEST_BYTES)
        """Of a request."""
        access = e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE
        with contextlib.ExitStack() as made:
            try:
                self._channel, self.fd = _channel(device.context)
                made.callback(self._channel.close)
                os.set_blocking(self.fd, False)
                self._cq = verbs.CQ(device.context, 2 * self.queue, None, self._channel, 0)
                made.callback(self._cq.close)
                for inline in INLINE_BYTES:
                    cap = verbs.QPCap(self.queue, self.queue, self.max_gather, 1, inline)
                    init = verbs.QPInitAttr(qp_type=e.IBV_QPT_RC, scq=self._cq, rcq=self._cq, cap=cap, sq_sig_all=0)
                    attr = verbs.QPAttr(port_num=port.port)
                    attr.qp_access_flags = access  # taken now; given later they are ignored
                    try:
                        self._qp = verbs.QP(device.pd, init, attr)
                        break
                    except verbs.Error:
                        if inline == INLINE_BYTES[-1]:
                            raise
                made.callback(self._qp.close)
                self.inline_bytes = inline
            except verbs.Error as error:
                raise UpgradeError(
                    f"RDMA device {device.name} grants no queue pair of {self.queue} requests ({error}): "
                    "lower rdma.queue"
                ) from error
            self._closing = made.pop_all()
        self.number: int = self._qp.qp_num
        self._write, self._write_immediate = e.IBV_WR_RDMA_WRITE, e.IBV_WR_RDMA_WRITE_WITH_IMM
        self._signaled, self._inline, self._solicited = e.IBV_SEND_SIGNALED, e.IBV_SEND_INLINE, e.IBV_SEND_SOLICITED
        self.poll = self._cq.poll
        """Take up to so many completions: their number, and a list."""
        self.arm = self._cq.req_notify
        """Have the descriptor tell of the next completion; with True, only of an arrival."""
        # Most requests gather from one place: these two are used for all of them.
        self._sge = verbs.SGE(0, 0, 0)
        self._request = verbs.SendWR(num_sge=1, sg=[self._sge])
        self._request.close()  # of its own copy
        self._request.sg_list = self._sge
        self._closing.callback(self._sge.close)

    def connect(self, local: Port, remote: Port, number: int, psn: int, remote_psn: int, timeout_s: float) -> None:
        """To the peer's queue pair ``number``; retries take at most ``timeout_s``, where they end."""
        verbs = pyverbs()
        attr = verbs.QPAttr(port_num=local.port)
        infiniband = local.link_layer == "infiniband"
        # Within an InfiniBand subnet the LID is enough.
        routed = not infiniband or remote.lid == 0 or remote.gid[:19] != local.gid[:19]
        route = {}
        if routed:
            gid = verbs.GID(remote.gid)
            route = {"gr": verbs.GlobalRoute(dgid=gid, sgid_index=local.gid_index, hop_limit=HOP_LIMIT)}
        attr.ah_attr = verbs.AHAttr(
            dlid=remote.lid if infiniband else 0, is_global=int(routed), port_num=local.port, **route
        )
        attr.dest_qp_num = number
        attr.path_mtu = MTUS.index(min(local.mtu, remote.mtu)) + 1
        attr.sq_psn, attr.rq_psn = psn, remote_psn
        attr.max_rd_atomic = attr.max_dest_rd_atomic = 1
        attr.min_rnr_timer, attr.rnr_retry = MIN_RNR_TIMER, RNR_RETRIES
        attr.timeout, attr.retry_cnt = ack_timeout(timeout_s), RETRIES
        try:
            self._qp.to_rts(attr)
        except verbs.Error as error:
            raise UpgradeError(
                f"no way from {local.place} ({local.device}) to {remote.place} over RDMA: {error}; check that both "
                "ports are on one network"
            ) from error

    def post_receives(self) -> None:
        """Take ``batch`` more arrivals."""
        self._qp.post_recv(_receives(self.batch))

    def post(
        self, serial: int, pieces: list[Piece], address: int, rkey: int, tag: int | None, *, signal: bool, inline: bool
    ) -> None:
        """Write ``pieces`` at ``address`` of the peer, and tell it if there is a tag, in the order of the network.

        ``serial``, which is not 0, names the completion.
        """
        flags = 0
        if signal:
            flags |= self._signaled
        if inline:
            flags |= self._inline
        if len(pieces) > 1:
            self._post_gathered(serial, pieces, address, rkey, tag, flags)
            return
        request = self._request
        if pieces:
            sge = self._sge
            sge.addr, sge.length, sge.lkey = pieces[0]
            request.num_sge = 1
        else:
            request.num_sge = 0
        request.wr_id = serial
        if tag is None:
            request.opcode = self._write
        else:
            request.opcode = self._write_immediate
            request.imm_data = tag
            flags |= self._solicited
        request.send_flags = flags
        request.set_wr_rdma(rkey, address)
        self._qp.post_send(request)

    def _post_gathered(
        self, serial: int, pieces: list[Piece], address: int, rkey: int, tag: int | None, flags: int
    ) -> None:
        verbs = pyverbs()
        sges = [verbs.SGE(*piece) for piece in pieces]
        request = verbs.SendWR(
            wr_id=serial,
            opcode=self._write if tag is None else self._write_immediate,
            num_sge=len(sges),
            imm_data=tag or 0,
            sg=sges,
            send_flags=flags if tag is None else flags | self._solicited,
        )
        request.set_wr_rdma(rkey, address)
        try:
            self._qp.post_send(request)
        finally:
            for made in (request, *sges):
                made.close()

    def take_event(self) -> bool:
        """Take what made the descriptor readable; False if somebody did before."""
        try:
            self._channel.get_cq_event(self._cq)
        except pyverbs().Error:
            return False
        self._cq.ack_events(1)
        return True

    def close(self) -> None:
        """Nothing arrives or leaves afterwards. May be called twice."""
        with contextlib.suppress(pyverbs().Error):
            self._closing.close()


def ack_timeout(seconds: float) -> int:
    """The exponent of verbs with which all retries together take at most ``seconds``."""
    exponent = 1
    while exponent < MAX_ACK_TIMEOUT and (RETRIES + 1) * ACK_TIMEOUT_UNIT_S * 2 ** (exponent + 1) <= seconds:
        exponent += 1
    return exponent


@functools.cache
def _receives(count: int) -> Any:
    """A chain of receives without memory: what arrives lands by address. It can be posted any number of times."""
    verbs = pyverbs()
    sge = verbs.SGE(0, 0, 0)
    following = None
    for _ in range(count):
        request = verbs.RecvWR(wr_id=0, num_sge=1, sg=[sge], next_wr=following)
        request.num_sge = 0  # none at all is refused above
        _chained.append(request)
        following = request
    sge.close()
    return following


_chained: list[Any] = []
"""All receives in chains: pyverbs links them by address only."""


def _channel(context: Any) -> tuple[Any, int]:
    """A completion channel and its descriptor, which pyverbs tells from version 59 on."""
    before = set(_event_fds())
    channel = pyverbs().CompChannel(context)
    if hasattr(channel, "fd"):
        return channel, channel.fd
    (fd,) = set(_event_fds()) - before
    return channel, fd


def _event_fds() -> Iterator[int]:
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own descriptor is closed by now
            if "[infinibandevent]" in os.readlink(f"/proc/self/fd/{name}"):
                yield int(name)


STATUSES = {
    "LOC_LEN_ERR": "a write was longer than the port allows",
    "LOC_QP_OP_ERR": "the device could not perform a write",
    "LOC_PROT_ERR": "memory that was to be sent is not registered",
    "WR_FLUSH_ERR": "the queue pair was in error already",
    "BAD_RESP_ERR": "the peer's device answered nonsense",
    "LOC_ACCESS_ERR": "the peer wrote where it may not",
    "REM_INV_REQ_ERR": "the peer's device refused an invalid request",
    "REM_ACCESS_ERR": "the peer's device refused access to its memory (remote access error)",
    "REM_OP_ERR": "the peer's device could not perform a write",
    "RETRY_EXC_ERR": "no answer from the peer's device (retry exceeded)",
    "RNR_RETRY_EXC_ERR": "the peer had no receive ready (receiver-not-ready retry exceeded)",
    "FATAL_ERR": "the device failed",
    "RESP_TIMEOUT_ERR": "the peer's device took too long",
    "GENERAL_ERR": "the device failed in an unknown way",
}


def status_in_words(status: int) -> str:
    """What a completion's status means."""
    e = pyverbs().e
    for name, words in STATUSES.items():
        if getattr(e, f"IBV_WC_{name}") == status:
            return words
    return f"status {status}"
