"""Both event loops, and links over TCP on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from lamina.transport import Address, Hello, Link, Listener, connect

Run = Callable[[Coroutine[Any, Any, Any]], Any]

LOCAL = Address.parse("127.0.0.1:0")


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a coroutine to its end, on each kind of loop."""
    if request.param == "asyncio":
        return asyncio.run
    return pytest.importorskip("uvloop").run


@pytest.fixture
def make_tcp_pair() -> Callable[[], Coroutine[Any, Any, tuple[Link, Link]]]:
    async def make_pair() -> tuple[Link, Link]:
        accepted: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        hello = Hello("memory", "m0", {"heads": [0, 4]})
        async with await Listener.open(LOCAL, hello, accepted.set_result, peer_timeout=10.0) as listener:
            link = await connect(listener.address, Hello("compute", "c0"), deadline_s=10.0, peer_timeout=10.0)
            return link, await accepted

    return make_pair
