"""Ask questions on a link and await their answers; and answer clients, which may not read."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable
from typing import Any

from lamina.errors import LaminaError, ProtocolError
from lamina.transport import Link
from lamina.wire.codec import Message, encode
from lamina.wire.parts import send_whole

MAX_PENDING_BYTES = 4 * 2**20
"""The bytes that a client or monitor may leave unread before its link is ended."""


class Questions:
    """Holds the questions that were asked on one link and are not answered yet. It belongs to the link's loop.

    Questions with the same key are answered in the order in which they were asked. Every question ends: with its
    answer, with an error of its own, or with the error that ended the link, which its owner passes to `fail`.
    """

    def __init__(self, link: Link, *, in_parts: bool = False) -> None:
        """``in_parts``: the peer takes questions that are too long for one message in parts."""
        self._link = link
        self._in_parts = in_parts
        self._waiting: dict[Hashable, deque[asyncio.Future[Any]]] = {}
        self._error: LaminaError | None = None

    def ask(self, message: Message, key: Hashable = None) -> asyncio.Future[Any]:
        """Send ``message`` now; the future gets the answer, or raises the error of `refuse` or `fail`.

        What is sent after this call comes after the question. An answer to a question whose asker gave up is dropped
        when it comes. ProtocolError, and no question, if the message cannot be sent.
        """
        waiting = self.expect(key)
        if not waiting.done():
            try:
                if self._in_parts:
                    send_whole(self._link, message)
                else:
                    self._link.send(encode(message))
            except ProtocolError:
                self._waiting[key].remove(waiting)
                raise
        return waiting

    def expect(self, key: Hashable = None) -> asyncio.Future[Any]:
        """Return a future for an answer that the peer gives unasked, or that other code asks for."""
        waiting: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._error is None:
            self._waiting.setdefault(key, deque()).append(waiting)
        else:
            _set_error(waiting, self._error)
        return waiting

    def answer(self, answer: Any, key: Hashable = None) -> bool:
        """Give the oldest question with this key its answer; return False if there is none."""
        waiting = self._next(key)
        if waiting is None:
            return False
        if not waiting.done():
            waiting.set_result(answer)
        return True

    def refuse(self, error: LaminaError, key: Hashable = None) -> bool:
        """Have the oldest question with this key raise an error; return False if there is none."""
        waiting = self._next(key)
        if waiting is None:
            return False
        _set_error(waiting, error)
        return True

    def fail(self, error: LaminaError) -> None:
        """No answer will come any more: every question raises ``error``, and every later one. The first error stays."""
        if self._error is None:
            self._error = error
        for waiting in [future for queue in self._waiting.values() for future in queue]:
            _set_error(waiting, error)
        self._waiting.clear()

    def _next(self, key: Hashable) -> asyncio.Future[Any] | None:
        queue = self._waiting.get(key)
        if not queue:
            return None
        waiting = queue.popleft()
        if not queue:
            del self._waiting[key]
        return waiting


def _set_error(waiting: asyncio.Future[Any], error: LaminaError) -> None:
    if not waiting.done():
        waiting.set_exception(error)
        waiting.exception()  # the asker may be gone; then asyncio should not complain


def send_unless_gone(link: Link, message: Message) -> bool:
    """Send to a client or monitor, unless it is gone; end the link of one that does not read, and return False."""
    state = link.state
    if state.closed:
        return False
    if state.pending_bytes > MAX_PENDING_BYTES:
        link.abort(f"{state.pending_bytes} bytes are left unread")
        return False
    link.send(encode(message))
    return True
