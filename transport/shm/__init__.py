"""Lanes over shared memory, for two nodes on one host: a write is one copy into the peer's region, or none.

Each end makes a file in memory with the rings of the tags that it receives, and an eventfd, its doorbell. Both go to
the peer over a Unix socket without a name in any file system, and so does each region that is exposed. They exist as
long as a process has them open, so nothing is left behind, however the processes end.

An end that sleeps says so in a word beside its rings, and only then does the peer ring its doorbell.
"""

from lamina.transport.shm.lanes import offer, upgrade

__all__ = ["offer", "upgrade"]
