"""The documentation says what the code does: it builds, and what it quotes exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from lamina import config

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import reference  # noqa: E402

PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
SOURCES = sorted(
    path for folder in ("lamina", "transport", "attention", "bench") for path in (ROOT / folder).rglob("*.py")
)


def blocks(language: str) -> Iterator[tuple[Path, str]]:
    """The fenced blocks of a language in all pages."""
    for page in PAGES:
        for text in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            yield page, text


def strings() -> str:
    """All text in the sources, with what f-strings fill in as ``{}``, joined as the compiler joins it."""
    said = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
                said.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    return "\n".join(said)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """No link is broken, no page is left out."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "prefill_tokens" in (tmp_path / "site" / "configuration.html").read_text()
    assert "--max-tokens" in (tmp_path / "site" / "commands.html").read_text()


def test_every_key_is_explained() -> None:
    """The reference has a sentence for each key of the cluster file."""
    for kind in reference.TABLES:
        texts = dict(reference.field_texts(kind))
        for field in msgspec.structs.fields(kind):
            assert texts[field.name].endswith("."), f"{kind.__name__}.{field.name}"


def test_every_cluster_file_of_the_pages_is_one(tmp_path: Path) -> None:
    """Whole files load; parts of a file are TOML, and have keys that exist."""
    whole = 0
    for page, text in blocks("toml"):
        plain = tomllib.loads(text)
        if {"model", "node"} <= plain.keys():
            secret = tmp_path / "cluster.key"
            secret.write_text("0" * 64)
            secret.chmod(0o600)
            (tmp_path / "cluster.toml").write_text(text)
            config.load(tmp_path / "cluster.toml")
            whole += 1
        for table, kind in (("model", "Model"), ("pipeline", "Pipeline"), ("transport", "Transport")):
            known = {field.name for field in msgspec.structs.fields(getattr(reference.schema, f"{kind}Config"))}
            assert plain.get(table, {}).keys() <= known, f"{page.name}: {text}"
    assert whole >= 3


def test_every_event_is_explained() -> None:
    """The page of log events has a row for each event of the sources, and for no other."""
    page = (ROOT / "docs" / "events.md").read_text()
    told = {name for row in re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    logged = set(re.findall(r"event=([a-z_]+)", strings())) | {"link_lost", "link_close_failed"}
    assert told == logged


@pytest.mark.parametrize(
    "message", re.findall(r"^`(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
)
def test_every_message_of_troubleshooting_is_one(message: str) -> None:
    """What the page quotes is what the sources say, apart from what is filled in."""
    said = strings()
    for part in message.split("..."):
        assert part.strip(" :;") in said, part
