from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lamina.model.slices import Blueprint
from tests.families import FAMILIES
from tests.model.compose import cut_checkpoint


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products are slower on several threads, by far where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The float32 checkpoint directory of a family by name, written once; nobody may change it."""

    @functools.cache
    def save(family: str) -> Path:
        return FAMILIES[family].save(tmp_path_factory.mktemp(family))

    return save


@pytest.fixture(scope="session")
def blueprint(saved: Callable[[str], Path]) -> Callable[[str], Blueprint]:
    """The float32 checkpoint of a family, captured and cut once: capturing takes a second or two."""
    return functools.cache(lambda family: cut_checkpoint(saved(family)))


@pytest.fixture(scope="session")
def original(saved: Callable[[str], Path]) -> Callable[[str], Any]:
    """The module of transformers with the weights of the same checkpoint, for comparison."""
    from transformers import AutoModelForCausalLM

    @functools.cache
    def load(family: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(saved(family), dtype="float32").eval()

    return load
