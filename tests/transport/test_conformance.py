"""Every transport keeps every promise of ``Link``."""

from __future__ import annotations

import pytest

from lamina.transport.testing import CHECKS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_conformance(run, make_pair, check):
    run(check(make_pair))
