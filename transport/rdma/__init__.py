"""Lanes over RDMA: one queue pair for each lane. The device writes from memory into the peer's memory, without a copy.

A write is an RDMA WRITE WITH IMMEDIATE, whose immediate is the tag. If it has more pieces or bytes than a work request
may have, plain RDMA WRITEs precede it. Every tag consumes a receive at the peer. The sender counts the receives that
are posted there, and the peer sends notes when it has posted more.

The device reads a source where it lies if that memory is registered. Exposed regions are registered, and other regions
are from their first write on. Of other memory, small pieces are copied to registered memory, and large ones are
registered for the time of the write.

Only some writes ask for a completion, and completions of writes do not wake the loop, unless something waits for them:
``drain``, or a write for which there is no room yet.
"""

from lamina.transport.rdma.lanes import offer, upgrade

__all__ = ["offer", "upgrade"]
