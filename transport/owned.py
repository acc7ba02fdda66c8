"""What every link keeps of its owner: the callbacks, and the one moment at which the owner learns of the end."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from lamina.errors import TransportError
from lamina.transport.base import Lane, Link, LinkInfo, log


class OwnedLink(Link):
    """Holds the callbacks of a link's owner, and reports a loss to it. `_end` and `_fail` are the ways to the end."""

    def __init__(self, info: LinkInfo) -> None:
        self._info = info
        self._open = True
        """Whether anything can be sent. It is cleared when the link begins to end."""
        self._error: TransportError | None = None
        self._lost: TransportError | None = None
        """The error that ``on_lost`` is told: this end did not end the link itself."""
        self._on_message: Callable[[dict[str, Any]], None] | None = None
        self._on_tag: Callable[[Lane, int], None] | None = None
        self._on_lost: Callable[[TransportError], None] | None = None

    @property
    def info(self) -> LinkInfo:
        return self._info

    def abort(self, reason: str) -> None:
        if self._end(TransportError(f"the link to {self} was aborted: {reason}")):
            log.warning('event=link_aborted transport=%s peer="%s" reason="%s"', self._info.transport, self, reason)

    @abstractmethod
    def _end(self, error: TransportError | None) -> bool:
        """Let go of everything and wake the coroutines that wait; False if that was done before."""

    def _let_go(self) -> None:
        """Deliver nothing any more. The owner, and the memory that it exposed, are free at once, and not when the
        garbage collector finds the circle of owner and link."""
        self._on_message = self._on_tag = None

    def _fail(self, error: TransportError, *, said_goodbye: bool = False) -> None:
        """End the link for a reason that its owner does not know yet. A peer that said goodbye is no cause for alarm:
        clients do so whenever they leave."""
        was_open = self._open
        if not self._end(error):
            return
        if said_goodbye:
            log.info('event=link_closed transport=%s peer="%s"', self._info.transport, self)
        else:
            event = "link_lost" if was_open else "link_close_failed"
            log.warning('event=%s transport=%s peer="%s" reason="%s"', event, self._info.transport, self, error)
        if was_open:
            self._lost = error
            self._tell_lost()

    def _callback_failed(self, error: Exception) -> None:
        """End the link because what arrived could not be handled."""
        log.error('event=callback_failed transport=%s peer="%s"', self._info.transport, self, exc_info=error)
        lost = TransportError(f"what {self} sent could not be handled: {error!r}")
        lost.__cause__ = error
        self._fail(lost)

    def _tell_lost(self) -> None:
        """Tell the owner of the loss, once."""
        on_lost, self._on_lost = self._on_lost, None
        if on_lost is not None and self._lost is not None:
            try:
                on_lost(self._lost)
            except Exception:
                log.exception('event=callback_failed transport=%s peer="%s"', self._info.transport, self)

    def _check_open(self) -> None:
        if not self._open:
            raise self._error or TransportError(f"the link to {self} is closed")
