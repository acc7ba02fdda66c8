"""Links between nodes: one-sided writes into the peer's memory, and small control messages.

Read the modules in the order in which a link comes to be. ``address`` names a place and ``options`` says how an end
wants its links. ``endpoints`` connects two nodes; ``handshake`` is what they exchange first, and ``choice`` selects the
transport. ``base`` is the contract of the ``Link`` that both ends then hold. ``link`` implements it over a control
``connection`` and the ``lanes`` of ``tcp``, ``shm`` or ``rdma``. ``frames`` and ``messages`` define the bytes, without
any socket. ``testing`` contains the checks that every transport must pass.
"""

from lamina.transport.address import Address
from lamina.transport.base import Hello, Lane, Link, LinkInfo, LinkState, Region, RemoteRegion
from lamina.transport.endpoints import Listener, connect
from lamina.transport.frames import PROTOCOL_VERSION
from lamina.transport.options import Options, RdmaOptions, TlsFiles

__all__ = [
    "PROTOCOL_VERSION",
    "Address",
    "Hello",
    "Lane",
    "Link",
    "LinkInfo",
    "LinkState",
    "Listener",
    "Options",
    "RdmaOptions",
    "Region",
    "RemoteRegion",
    "TlsFiles",
    "connect",
]
