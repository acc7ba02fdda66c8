"""How one process passes memory to another: files without a name, and a Unix socket."""

from __future__ import annotations

import asyncio
import fcntl
import hmac
import os
import secrets
import socket
import struct
from array import array
from contextlib import ExitStack
from typing import TYPE_CHECKING

from lamina.errors import CapacityError, ProtocolError
from lamina.transport.base import SEALS
from lamina.transport.lanes import UpgradeError

if TYPE_CHECKING:
    from lamina.transport.handshake import Session


_BACKLOG = 16


async def meet(session: Session) -> socket.socket:
    """Connect a Unix socket to the peer, both ends of which prove that they know the link's key."""
    with ExitStack() as stack:
        own = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK))
        # The name is in the abstract namespace, so it ends with its socket.
        name = b"\0lamina-" + secrets.token_hex(16).encode()
        own.bind(name)
        if not session.connecting:
            own.listen(_BACKLOG)
        await session.send({"socket": name})
        match await session.receive():
            case {"socket": bytes(peer_name)} if peer_name[:1] == b"\0" and len(peer_name) == len(name):
                pass
            case message:
                raise UpgradeError(f"the peer did not send the name of its socket: {message!r:.200}")
        if session.connecting:
            own.connect(peer_name)
            sock, names = own, name + peer_name
        else:
            sock, names = stack.enter_context(await _accept(own, peer_name)), peer_name + name
        _check_user(sock, session)
        # The proofs cover both names, so a process in between cannot pass them on.
        proofs = [
            hmac.digest(session.key, b"shm " + end + session.link_id + names, "sha256")
            for end in (b"connecting", b"listening")
        ]
        if session.connecting:
            sock.send(proofs[0])
            await receive(sock, proofs[1], 0)
        else:
            await receive(sock, proofs[0], 0)
            sock.send(proofs[1])
            own.close()
        stack.pop_all()
        return sock


async def _accept(listening: socket.socket, peer_name: bytes) -> socket.socket:
    """Accept the peer's connection. Any process of the host may connect, but only the peer has the peer's name."""
    while True:
        await _until_readable(listening)
        sock, name = listening.accept()
        if name == peer_name:
            return sock
        sock.close()


def _check_user(sock: socket.socket, session: Session) -> None:
    """Check the peer's user where there is no secret, which would prove more."""
    credentials = struct.Struct("iII")
    _, user, _ = credentials.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))
    if session.options.secret is None and user != os.geteuid():
        raise UpgradeError(
            f"the peer runs as user {user}, this node as {os.geteuid()}: without a cluster secret they share no memory"
        )


def make_memory(nbytes: int) -> int:
    """Make an anonymous file of zeros whose size cannot be changed."""
    fd = os.memfd_create("lamina-rings", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def make_doorbell() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def check_memory(fd: int, nbytes: int, what: str) -> None:
    """Raise ProtocolError for memory that is too small or could become so: touching it would kill this process."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ProtocolError(f"{what} does not lie in a memfd: {error}") from error
    if not seals & fcntl.F_SEAL_SHRINK:
        raise ProtocolError(f"{what} lies in a memfd that can be shortened")
    size = os.fstat(fd).st_size
    if size < nbytes:
        raise ProtocolError(f"{what} should have {nbytes} bytes, and lies in a memfd of {size}")


def region_message(key: int) -> bytes:
    return b"region %d" % key


async def receive(sock: socket.socket, expected: bytes, count: int) -> list[int]:
    await _until_readable(sock)
    return take(sock, expected, count)


def take(sock: socket.socket, expected: bytes, count: int) -> list[int]:
    """Receive the message ``expected`` with ``count`` files, without waiting. Raises ProtocolError for another."""
    room = socket.CMSG_SPACE(count * array("i").itemsize) if count else 0
    data, ancillary, flags, _ = sock.recvmsg(len(expected) + 1, room, socket.MSG_CMSG_CLOEXEC)
    files = array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            files.frombytes(content[: len(content) - len(content) % files.itemsize])
    if hmac.compare_digest(data, expected) and len(files) == count and not flags & socket.MSG_CTRUNC:
        return files.tolist()
    for fd in files:
        os.close(fd)
    if flags & socket.MSG_CTRUNC and data == expected:
        raise CapacityError(f"no file descriptor is left for {count} files of the peer: raise the limit (ulimit -n)")
    what = "sent an unexpected message on" if data else "closed"
    raise ProtocolError(f"the peer {what} the Unix socket")


async def _until_readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def on_ready() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock, on_ready)
    try:
        await ready
    finally:
        loop.remove_reader(sock)
