"""Settings of all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from lamina.model.cache import keep_inductor_private

if TYPE_CHECKING:
    from tests.oracle import Agreement

# Test runners and nodes share few cores: one computing thread each. Set before torch is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
keep_inductor_private()


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nodes keep their journals, and servers their files, where no later run finds them."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def agreement(request: pytest.FixtureRequest) -> Iterator[Agreement]:
    """Ties of all comparisons together, which are reported: more than one in a thousand tokens is no coincidence."""
    from tests.oracle import Agreement

    agreement = Agreement()
    yield agreement
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        sys.stderr.write(f"\n{agreement.tokens} tokens compared with transformers, {len(agreement.ties)} ties\n")
    assert len(agreement.ties) * 1000 <= agreement.tokens, agreement.ties
