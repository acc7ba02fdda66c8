"""RDMA keeps every promise of ``Link``, and some of its own."""

from __future__ import annotations

import pytest
import uvloop

from lamina.transport.testing import CHECKS
from tests.rdma.inside import links


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_conformance(check):
    uvloop.run(check(links.make_pair))
