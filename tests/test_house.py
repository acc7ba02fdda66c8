"""The measures of the house: sizes of modules, names of classes, and what the rooms must not touch."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

from lamina.transport import Link

ROOT = Path(__file__).parent.parent
ROOMS = ("front", "compute", "memory", "wire")
MAX_LINES = 500


def _modules() -> list[Path]:
    """All modules but tests, each once: the links inside the package are left out."""
    folders = [ROOT / name for name in ("transport", "attention", "bench")]
    folders += [path for path in (ROOT / "lamina").iterdir() if path.is_dir() and not path.is_symlink()]
    return sorted([*(ROOT / "lamina").glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))])


def test_no_module_is_too_long() -> None:
    """A module that grows beyond 500 lines holds more than one idea."""
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in _modules()}

    assert len(lines) > 150
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}


def test_no_process_imports_from_the_current_folder() -> None:
    """Python is started with -P: else a token.py or queue.py of the user replaces a module of the library."""
    python = r"\[?(sys\.executable|str\(_python\(\w+\)\)), *"
    starts = [
        (path.name, match) for path in _modules() for match in re.finditer(python + r"\s*(\S+)", path.read_text())
    ]
    starts = [(name, match) for name, match in starts if not match[2].startswith(("str(SCRIPTS", "*self"))]

    assert len(starts) >= 8
    assert [f"{name}: {match[0]}" for name, match in starts if match[2] != '"-P",'] == []


def test_no_class_name_stands_for_two_things() -> None:
    """Not even with an underscore before one of them."""
    places = defaultdict(list)
    for path in _modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(f"{path.relative_to(ROOT)}:{node.lineno}")

    assert len(places) > 200
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_names_no_clock_thread_or_socket(room: str) -> None:
    """What import contracts cannot see: a call by a full name."""
    pattern = re.compile(r"\b(time|threading)\.|\basyncio\.(open_connection|start_server|to_thread)\b")
    found = [
        f"{path.name}: {line.strip()}"
        for path in sorted((ROOT / "lamina" / room).glob("*.py"))
        for line in path.read_text().splitlines()
        if pattern.search(line) and ".loop.time" not in line and "_loop().time" not in line
    ]

    assert found == []


def test_a_link_has_nine_public_members() -> None:
    """Its docstring says why ``close`` and ``abort`` are two; a tenth would need a reason as well."""
    members = {name for name in vars(Link) if not name.startswith("_")}

    assert members == {"info", "state", "deliver", "expose", "window", "write", "send", "close", "abort"}
