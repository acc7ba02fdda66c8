"""A queue pair: a thin layer over pyverbs.

pyverbs frees no work request by itself. So work requests are made once and used again where that is possible, and
closed where it is not.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

from lamina.transport.lanes import UpgradeError
from lamina.transport.options import MTUS
from lamina.transport.rdma.bindings import pyverbs
from lamina.transport.rdma.device import RdmaDevice
from lamina.transport.rdma.ports import RdmaPort

MAX_REQUEST_BYTES = 1 << 20
"""One work request carries at most this many bytes, so that progress shows on a slow network too."""
INLINE_BYTES = (256, 64, 0)
"""The bytes that a work request may carry inline: the first size that the device grants is used."""
RETRIES = 7
"""Retries after a packet that is not acknowledged. Soft-RoCE takes 7 for no limit, and with a smaller number gives up
where a few percent of the packets are lost. So the user of a queue pair must watch for progress."""
ACK_TIMEOUT_UNIT_S = 4.096e-6
MAX_ACK_TIMEOUT = 17
"""The exponent of 0.54 s. Some losses cost as much time, so it does not grow with ``peer_timeout`` without bound."""
RNR_RETRIES = 7
"""Retries without end, because credits guarantee that a receive is posted."""
MIN_RNR_TIMER = 1
"""The code of 0.01 ms."""
HOP_LIMIT = 64
Piece = tuple[int, int, int]
"""Registered memory from which a request gathers: address, bytes, local key."""


class QueuePair:
    """A reliable connection: a queue pair, its completion queue, and a descriptor that announces completions."""

    def __init__(self, device: RdmaDevice, port: RdmaPort, queue: int) -> None:
        """Raises UpgradeError, after it has freed everything."""
        verbs = pyverbs()
        e = verbs.e
        self.batch = min(queue, device.max_queue) // 4
        """The number of receives that are posted at once."""
        self.queue = 4 * self.batch
        """The number of requests that may be in flight, and of receives that are posted."""
        self.max_gather = device.max_gather
        self.max_bytes = min(device.context.query_port(port.port).max_msg_sz, MAX_REQUEST_BYTES)
        """The most bytes of a request."""
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
        """Take up to so many completions; returns their number and a list."""
        self.arm = self._cq.req_notify
        """Have the descriptor announce the next completion; with True, only that of an arrival."""
        # Most requests gather from one place, and these two objects are used for all of those.
        self._sge = verbs.SGE(0, 0, 0)
        self._request = verbs.SendWR(num_sge=1, sg=[self._sge])
        self._request.close()  # of its own copy
        self._request.sg_list = self._sge
        self._closing.callback(self._sge.close)

    def connect(
        self, local: RdmaPort, remote: RdmaPort, number: int, psn: int, remote_psn: int, timeout_s: float
    ) -> None:
        """Connect to queue pair ``number`` of the peer. Retries take at most ``timeout_s`` where they end."""
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
                f"no route from {local.place} ({local.device}) to {remote.place} over RDMA: {error}; check that both "
                "ports are on one network"
            ) from error

    def post_receives(self) -> None:
        """Post ``batch`` more receives."""
        self._qp.post_recv(_receives(self.batch))

    def post(
        self, serial: int, pieces: list[Piece], address: int, rkey: int, tag: int | None, *, signal: bool, inline: bool
    ) -> None:
        """Write ``pieces`` at ``address`` of the peer; a ``tag``, in network byte order, is delivered there.

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
        """Take the event that made the descriptor readable; False if it was taken before."""
        try:
            self._channel.get_cq_event(self._cq)
        except pyverbs().Error:
            return False
        self._cq.ack_events(1)
        return True

    def close(self) -> None:
        """Close the queue pair: nothing arrives or leaves afterwards. May be called twice."""
        with contextlib.suppress(pyverbs().Error):
            self._closing.close()


def ack_timeout(seconds: float) -> int:
    """The exponent of the time-out with which all retries together take at most ``seconds``."""
    exponent = 1
    while exponent < MAX_ACK_TIMEOUT and (RETRIES + 1) * ACK_TIMEOUT_UNIT_S * 2 ** (exponent + 1) <= seconds:
        exponent += 1
    return exponent


@functools.cache
def _receives(count: int) -> Any:
    """Make a chain of receives without memory, as writes carry their address. It can be posted any number of times."""
    verbs = pyverbs()
    sge = verbs.SGE(0, 0, 0)
    following = None
    for _ in range(count):
        request = verbs.RecvWR(wr_id=0, num_sge=1, sg=[sge], next_wr=following)
        request.num_sge = 0  # the constructor refuses 0
        _chained.append(request)
        following = request
    sge.close()
    return following


_chained: list[Any] = []
"""Keeps the receives of all chains alive, because pyverbs links them by address only."""


def _channel(context: Any) -> tuple[Any, int]:
    """Make a completion channel and find its descriptor, which pyverbs tells from version 59 on."""
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
