"""What pyverbs can do between two processes, without an event loop and without Lamina's transport.

``python -m lamina.bench.yardsticks.verbs NEAR_DEVICE FAR_DEVICE NEAR_CPU FAR_CPU`` speaks the protocol of
``pingpong.c``. Each write is an RDMA WRITE WITH IMMEDIATE, and the process that waits for it blocks until a completion
event.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import statistics
import sys
import time
from collections import deque
from typing import Any

from lamina.bench.ends import Task
from lamina.bench.variants import pin
from lamina.transport import RdmaOptions
from lamina.transport.base import address_of
from lamina.transport.rdma.bindings import pyverbs
from lamina.transport.rdma.ports import RdmaPort, find_port

SPAN_BYTES = 64 << 20
QUEUE = 1024
SIGNAL_EVERY = 32
MIN_RNR_TIMER, RNR_RETRIES = 1, 7
TIMEOUT, RETRIES = 14, 6


class VerbsEnd:
    """A queue pair, with memory to send from and memory to receive into."""

    def __init__(self, device: str, talk: socket.socket) -> None:
        """Connect to the other end; both exchange their addresses over the socket ``talk``."""
        verbs = pyverbs()
        e = verbs.e
        port = find_port(RdmaOptions(device=device))
        access = e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE
        self._memory = memoryview(mmap.mmap(-1, 2 * SPAN_BYTES))
        self._source = address_of(self._memory)
        context = verbs.Context(name=port.device)
        domain = verbs.PD(context)
        self._region = verbs.MR(domain, len(self._memory), access, address=self._source)
        self._channel = verbs.CompChannel(context)
        self._arrivals = verbs.CQ(context, QUEUE, None, self._channel, 0)
        self._sent = verbs.CQ(context, QUEUE, None, None, 0)
        cap = verbs.QPCap(max_send_wr=QUEUE, max_recv_wr=QUEUE, max_send_sge=1, max_recv_sge=1, max_inline_data=0)
        init = verbs.QPInitAttr(qp_type=e.IBV_QPT_RC, scq=self._sent, rcq=self._arrivals, cap=cap, sq_sig_all=0)
        attr = verbs.QPAttr(port_num=port.port)
        attr.qp_access_flags = access
        self._pair = verbs.QP(domain, init, attr)
        self._receive = verbs.RecvWR(num_sge=1, sg=[verbs.SGE(0, 0, 0)])
        self._receive.num_sge = 0
        for _ in range(QUEUE // 2):
            self._pair.post_recv(self._receive)
        self._arrivals.req_notify()
        self._piece = verbs.SGE(self._source, 0, self._region.lkey)
        self._write = verbs.SendWR(opcode=e.IBV_WR_RDMA_WRITE_WITH_IMM, num_sge=1, sg=[self._piece])
        self._write.sg_list = self._piece
        self._flag, self._ok = e.IBV_SEND_SIGNALED, e.IBV_WC_SUCCESS
        self._writes = 0
        self._connect(attr, port, talk)

    def _connect(self, attr: Any, local: RdmaPort, talk: socket.socket) -> None:
        verbs = pyverbs()
        mine = [vars(local), self._pair.qp_num, self._source + SPAN_BYTES, self._region.rkey]
        talk.sendall(json.dumps(mine).encode() + b"\n")
        theirs, number, self._target, self._key = json.loads(talk.makefile("rb", buffering=0).readline())
        remote = RdmaPort.from_offer(theirs)
        routed = local.link_layer == "ethernet"
        route = {}
        if routed:
            route["gr"] = verbs.GlobalRoute(dgid=verbs.GID(remote.gid), sgid_index=local.gid_index, hop_limit=64)
        attr.ah_attr = verbs.AHAttr(dlid=remote.lid, is_global=int(routed), port_num=local.port, **route)
        attr.dest_qp_num = number
        attr.path_mtu = min(local.mtu, remote.mtu).bit_length() - 8  # 256 bytes are 1
        attr.max_rd_atomic = attr.max_dest_rd_atomic = 1
        attr.min_rnr_timer, attr.rnr_retry = MIN_RNR_TIMER, RNR_RETRIES
        attr.timeout, attr.retry_cnt = TIMEOUT, RETRIES
        self._pair.to_rts(attr)
        talk.sendall(b".")  # a write before the other end is ready would wait for a retry
        talk.recv(1)

    def put(self, offset: int, size: int) -> None:
        write, piece = self._write, self._piece
        piece.addr, piece.length = self._source + offset, size
        write.num_sge = 1 if size else 0
        self._writes += 1
        signaled = self._writes % SIGNAL_EVERY == 0
        write.send_flags = self._flag if signaled else 0
        write.set_wr_rdma(self._key, self._target + offset)
        self._pair.post_send(write)
        if signaled:
            self._check(self._sent.poll(SIGNAL_EVERY)[1])

    def take(self) -> int:
        """Wait for at least one write of the other end, and return how many have arrived."""
        came = 0
        while not came:
            self._channel.get_cq_event(self._arrivals)
            self._arrivals.ack_events(1)
            self._arrivals.req_notify()
            while (found := self._arrivals.poll(16))[0]:
                self._check(found[1])
                came += found[0]
        for _ in range(came):
            self._pair.post_recv(self._receive)
        return came

    def _check(self, completions: Any) -> None:
        for completion in completions:
            if completion.status != self._ok:
                sys.exit(f"verbs: a completion has status {completion.status}")


def _near_batch(end: VerbsEnd, task: Task, count: int, trips: list[float]) -> None:
    now = time.perf_counter
    if task.phase == "round_trip":
        for _ in range(count):
            before = now()
            end.put(0, task.size)
            end.take()
            trips.append(now() - before)
        return
    under_way: deque[float] = deque()
    written = answered = 0
    while answered < count:
        while written < count and len(under_way) < task.depth:
            under_way.append(now())
            end.put(written % task.slots * task.size, task.size)
            written += 1
        for _ in range(end.take()):
            trips.append(now() - under_way.popleft())
            answered += 1


def _far_batch(end: VerbsEnd, task: Task, count: int) -> None:
    size = task.size if task.phase == "round_trip" else 0
    while count:
        came = end.take()
        for _ in range(came):
            end.put(0, size)
        count -= came


def _measure(end: VerbsEnd, task: Task, talk: socket.socket) -> dict[str, float]:
    trips: list[float] = []

    def run(count: int) -> float:
        talk.sendall(f"{count} {task.line}\n".encode())
        before = time.perf_counter()
        _near_batch(end, task, count, trips)
        return time.perf_counter() - before

    count = 2 * task.slots + 16
    took = run(count)  # touches all memory; its time does not count
    trips.clear()
    total = 0.0
    while total < task.seconds:
        count = max(4, int(count * task.seconds / 4 / took))
        took = run(count)
        total += took
    percentiles = statistics.quantiles(trips, n=100, method="inclusive")
    return {
        "p50_us": percentiles[49] * 1e6,
        "p99_us": percentiles[98] * 1e6,
        "gbps": len(trips) * task.size / total / 1e9,
    }


def main(near_device: str, far_device: str, near_cpu: int, far_cpu: int) -> None:
    near, far = socket.socketpair()
    if os.fork() == 0:  # before a device is opened, as a child cannot use what it inherits of one
        near.close()
        pin(far_cpu)
        end = VerbsEnd(far_device, far)
        for line in far.makefile():
            count, task = line.split(maxsplit=1)
            _far_batch(end, Task.read(task), int(count))
        os._exit(0)
    far.close()
    pin(near_cpu)
    end = VerbsEnd(near_device, near)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_measure(end, Task.read(line), near)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
