"""Lanes over RDMA: a queue pair each. The device writes from memory into the peer's memory; nothing is copied.

A write is an RDMA WRITE WITH IMMEDIATE, whose immediate is the tag; if it has more pieces or bytes than a request may,
plain RDMA WRITEs go before. Every tag takes a receive at the peer, of which the sender knows how many are posted: the
peer tells by notes when it has posted more. Sources are sent from where they lie if that is registered: regions that
are exposed, and regions that are only sources from their first write on. Of other memory, tiny and small pieces are
copied, and large ones are registered for the time of the write.

Completions of writes wake nobody, and only some writes have one, unless somebody waits for them: ``drain``, or a write
for which there is no room yet.
"""

from lamina.transport.rdma.lanes import offer, upgrade

__all__ = ["offer", "upgrade"]
