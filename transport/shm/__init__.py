"""Lanes over shared memory, for two nodes on one host: a write is one copy into the peer's region, or none.

Each end makes a file in memory with the rings of what it receives, and an eventfd, its doorbell. Both go to the peer
over a Unix socket without a name in any file system, and so does each region that is exposed. All of it lives as long
as somebody has it open, so nothing is left behind, however the processes end.

The doorbell is rung only for an end that said it sleeps, in a word beside its rings.
"""

from lamina.transport.shm.lanes import offer, upgrade

__all__ = ["offer", "upgrade"]
