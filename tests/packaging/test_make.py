"""``make setup`` in a small tree: the real Makefile with real pip, for a package that needs nothing from an index."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAKE = shutil.which("make") or "make"

PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "small"
version = "1.0"

[project.optional-dependencies]
dev = []
"""

BACKEND = '''
import zipfile

FILES = {
    "small/__init__.py": "",
    "small/template.py": "class {{ name }}:",
    "small-1.0.dist-info/METADATA": "Metadata-Version: 2.1\\nName: small\\nVersion: 1.0\\nProvides-Extra: dev\\n",
    "small-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\\nGenerator: small\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    "small-1.0.dist-info/RECORD": "",
}


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """Build a wheel with a module that is a template and no Python, as some packages ship."""
    name = "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(f"{wheel_directory}/{name}", "w") as wheel:
        for path, text in FILES.items():
            wheel.writestr(path, text)
    return name


build_wheel = build_editable
'''


def test_setup_reports_no_error_and_says_what_it_does(tmp_path: Path) -> None:
    """A fresh set-up prints what it is doing, and no error where a package ships a template that is no Python."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "attention" / "native").mkdir(parents=True)
    for name in ("constraints.txt", "hatch_build.py", "attention/native/build.py"):
        (tmp_path / name).touch()
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "backend.py").write_text(BACKEND)

    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MAKE", "VIRTUAL_"))
    }
    done = subprocess.run(
        [MAKE, "setup"], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=100, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Error" not in done.stdout
    assert [line.split(":")[0] for line in done.stdout.splitlines()[:3]] == [f"Making .venv ({i}/3)" for i in (1, 2, 3)]
    compiled = {file.name.split(".")[0] for file in tmp_path.glob(".venv/lib/*/site-packages/small/__pycache__/*.pyc")}
    assert compiled == {"__init__"}
