"""A state machine without I/O checks the protocol of a batch slot between a compute node and a memory node.

In each step of a batch a compute node writes, over one link: the step plan; and for each layer that it runs, in
increasing order, the query, then the keys and values if the step stores any. The memory node answers each query before
the next one comes. A compute node gives up a step by sending the plan of the next one, at any moment. What belongs to
an older step is stale.
"""

from __future__ import annotations

from enum import Enum, auto

from lamina.errors import ProtocolError
from lamina.wire.tags import Kind, Tag


class _Phase(Enum):
    """Says what a slot waits for."""

    IDLE = auto()
    """The plan of the next step, or the query of the step's next layer."""
    ASKED = auto()
    """The keys and values of the query's layer, or, if the step stores none, the answer."""
    STORED = auto()
    """The answer: query, keys and values are there."""


class MemorySlot:
    """Tracks one batch in flight on one link, for the memory node: which writes may come next.

    The owner passes every tag to `receive`, calls `planned` when it has read a plan, and `answered` after each answer.
    """

    def __init__(self, number: int, layers: int) -> None:
        """``layers`` is the number of the model's layers; ``number`` is for messages."""
        self.step = -1
        """The low bits of the present step's number."""
        self.layer = -1
        """The layer of the last query of the step."""
        self._number = number
        self._layers = layers
        self._phase = _Phase.IDLE
        self._stores: bool | None = None
        """Whether the step stores keys and values; None until its plan has been read."""

    def receive(self, tag: Tag) -> bool:
        """Take in a write of this slot; return False for a stale one. Raises ProtocolError for one that may not come
        now."""
        if tag.kind is Kind.PLAN:
            self.step, self.layer, self._phase, self._stores = tag.step, -1, _Phase.IDLE, None
            return True
        if tag.kind not in (Kind.QUERY, Kind.KEY_VALUE) or tag.step != self.step:
            return False
        if tag.kind is Kind.QUERY:
            self._query(tag.layer)
        else:
            self._key_value(tag.layer)
        return True

    def planned(self, step: int, *, stores: bool) -> None:
        """The plan of ``step`` has been read; ``stores`` says whether keys and values follow each query.

        Raises ProtocolError if some have come in a step that stores none.
        """
        if step != self.step:
            return  # the step was given up meanwhile
        self._stores = stores
        if self._phase is _Phase.STORED and not stores:
            raise self._stores_none(self.layer)

    def answered(self, step: int) -> None:
        """The last query of ``step`` has its answer."""
        if step == self.step:
            self._phase = _Phase.IDLE

    def _query(self, layer: int) -> None:
        if self._phase is not _Phase.IDLE or not self.layer < layer < self._layers:
            unanswered = " that is not answered" if self._phase is not _Phase.IDLE else ""
            raise ProtocolError(
                f"a query of layer {layer} in step {self.step} of batch slot {self._number}, after one of layer "
                f"{self.layer}{unanswered}; expected increasing layers below {self._layers}, one at a time"
            )
        self.layer, self._phase = layer, _Phase.ASKED

    def _key_value(self, layer: int) -> None:
        if self._phase is not _Phase.ASKED or layer != self.layer:
            raise ProtocolError(
                f"keys and values of layer {layer} in step {self.step} of batch slot {self._number}; expected them "
                "once, between the query of that layer and its answer"
            )
        if self._stores is False:
            raise self._stores_none(layer)
        self._phase = _Phase.STORED

    def _stores_none(self, layer: int) -> ProtocolError:
        return ProtocolError(
            f"keys and values of layer {layer} in step {self.step} of batch slot {self._number}, which stores none"
        )
