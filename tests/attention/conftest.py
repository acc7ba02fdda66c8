from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.attention.backends import Target


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors here are small: on a busy machine several threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _target_is_there(request: pytest.FixtureRequest) -> None:
    """Said once for each test, rather than in the middle of a search."""
    callspec = getattr(request.node, "callspec", None)
    target = callspec.params.get("target") if callspec else None
    if isinstance(target, Target):
        target.require()
