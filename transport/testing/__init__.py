"""Checks that every transport passes: the promises of ``Link``, one coroutine each.

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_conformance(check):
        asyncio.run(check(make_pair))

``make_pair`` makes two fresh links, the two ends of one connection, which do not deliver anything yet.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from lamina.transport.testing import endings, flow, owners, regions, writes
from lamina.transport.testing.ends import MakePair, noise, two_ends, until_sent

__all__ = ["CHECKS", "MakePair", "noise", "two_ends", "until_sent"]

CHECKS: tuple[Callable[[MakePair], Awaitable[None]], ...] = tuple(
    value
    for module in (writes, flow, owners, regions, endings)
    for name, value in vars(module).items()
    if name.startswith("check_")  # found by name: a check that was forgotten in a list would never fail
)
"""All checks."""
