"""Moving bytes between two nodes: one-sided writes into the peer's memory, and small control messages.

The way through this package, in the order of use: ``address`` names a place, ``endpoints`` connects two nodes
there, ``handshake`` is what they say first, and ``base`` is what they then hold: a ``Link``. Underneath, ``tcp``
implements it over two connections, ``frames`` and ``messages`` are its bytes without any socket, and ``testing``
holds the checks that every implementation passes.
"""

from lamina.transport.address import Address
from lamina.transport.base import Hello, Lane, Link, Region, RemoteRegion
from lamina.transport.endpoints import Listener, connect
from lamina.transport.frames import PROTOCOL_VERSION

__all__ = [
    "PROTOCOL_VERSION",
    "Address",
    "Hello",
    "Lane",
    "Link",
    "Listener",
    "Region",
    "RemoteRegion",
    "connect",
]
