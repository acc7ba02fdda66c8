"""What the project says about installing itself is true: its name, its extras, its classifiers."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

import lamina
from lamina.attention.backend import default_backend
from lamina.bench import plots
from lamina.errors import ConfigError, install_extra
from lamina.ops.doctor import machine
from lamina.transport.lanes import UpgradeError
from lamina.transport.rdma.bindings import pyverbs

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEXTS = (".py", ".md", ".toml", ".sh", ".yml", ".txt", "")


def texts() -> dict[str, str]:
    """The text files that a user may read advice in, by their path."""
    folders = ("lamina", "transport", "attention", "bench", "docs", "deploy", ".ci", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.suffix in TEXTS]
    files += [file for file in ROOT.iterdir() if file.suffix in TEXTS and not file.name.startswith(".")]
    return {str(f.relative_to(ROOT)): f.read_text() for f in files if f.is_file() and f != Path(__file__)}


def test_no_advice_installs_the_project_by_a_name_from_an_index() -> None:
    """Before a release, another's distribution may be found under any name of the project."""
    name = re.compile(r"\blamina(-llm)?\[|(pip|uv)( \S+)* install( -\S+)* ['\"]?lamina\b")

    assert len(texts()) > 200
    assert [path for path, text in texts().items() if name.search(text)] == []


def test_every_extra_that_is_advised_exists() -> None:
    """The advice names extras of ``pyproject.toml``, in messages and in documents."""
    advised = re.compile(r"install_extra\(['\"](\w+)['\"]\)|['\" ]\.\[(\w+)\]")
    found = {extra for text in texts().values() for pair in advised.findall(text) for extra in pair if extra}

    assert found >= {"bench", "flashinfer", "rdma"}
    assert found <= PROJECT["optional-dependencies"].keys()


def test_the_doctor_knows_the_version() -> None:
    """It is that of the code, whatever the distribution is called that it was installed from."""
    [found] = [finding for finding in machine.software() if finding.item == "software"]

    assert f"lamina {lamina.__version__}," in found.found


def test_messages_say_how_to_install_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without matplotlib, pyverbs or flashinfer, the user is told to install the extra from the checkout."""
    for module in ("matplotlib", "matplotlib.figure", "pyverbs", "flashinfer"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("lamina.attention.backend.find_spec", lambda name: None)
    monkeypatch.setattr("lamina.attention.backend.require_backend", lambda name: None)
    pyverbs.cache_clear()

    with pytest.raises(ConfigError, match=re.escape(install_extra("bench"))):
        plots.figure_class()
    with pytest.raises(UpgradeError, match=re.escape(install_extra("rdma"))):
        pyverbs()
    assert default_backend("cuda") == "torch"
    assert install_extra("flashinfer").replace("'", "") in caplog.text.replace("\\'", "").replace("'", "")
    assert install_extra("bench") == "in a checkout of Lamina, run: pip install '.[bench]'"
