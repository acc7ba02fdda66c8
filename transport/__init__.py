"""Moving bytes between two nodes: one-sided writes into the peer's memory, and small control messages.

The way through this package, in the order of use: ``address`` names a place, ``endpoints`` connects two nodes there by
the rules of ``options``, ``handshake`` is what they say first and ``choice`` what they agree on, and ``base`` is the
contract of what they then hold: a ``Link``. ``link`` implements it over a control ``connection`` and ``lanes``, those
of ``tcp``, ``shm`` or ``rdma``. ``frames`` and ``messages`` are the bytes without any socket, and ``testing`` holds the
checks that every transport passes.
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
