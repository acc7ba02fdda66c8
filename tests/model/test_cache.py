"""Where compiled functions are kept: out of reach of other users, also of those who would make the folder first."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lamina.demo.run import CHECKPOINT
from lamina.errors import ConfigError
from lamina.model.cache import cache_folder

ANOTHER_USER = 54321
"""The number of a user without an entry in the password file."""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")

START = """
import dataclasses, pathlib, sys, torch
from lamina import log
from lamina.model.capture import capture
from lamina.model.checkpoint import Checkpoint
from lamina.model.slices import SlicedModel, cut_into_slices
from lamina.model.weights import load_weights
log.configure("c0")
with torch.inference_mode(False):
    cut = cut_into_slices(capture(Checkpoint.open(pathlib.Path(sys.argv[1]))))
    last = len(cut.slices) - 1
    weights = load_weights(cut.capture, cut.weights_of(last, last), torch.device("cpu"))
    SlicedModel(cut, weights, torch.device("cpu"), last, last, compiled=True)
"""
"""What a compute node does with a model that has only its last slice here: two functions to compile."""

NO_HOME = f"""
import os, stat
from lamina import log
from lamina.model.cache import cache_folder, keep_inductor_private
log.configure("c0")
if os.geteuid() == 0:
    os.setresuid(*[{ANOTHER_USER}] * 3)
keep_inductor_private()
folder = cache_folder("inductor")
assert cache_folder("inductor") == folder
assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
for part in (folder, folder.parent):
    assert stat.S_IMODE(part.stat().st_mode) == 0o700
    assert part.stat().st_uid == os.geteuid()
print(folder.parent)
"""


def run(code: str, *arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, with other variables; None removes one. It must succeed."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_start_keeps_what_it_compiles_to_itself(tmp_path: Path) -> None:
    """All of it: headers too. Nothing of it appears where temporary files do, not even in the folder that torch would
    have taken, and no other user may enter the folders."""
    (scratch := tmp_path / "tmp").mkdir()
    cache = tmp_path / "cache"

    done = run(START, str(CHECKPOINT), TMPDIR=str(scratch), XDG_CACHE_HOME=str(cache), TORCHINDUCTOR_CACHE_DIR=None)

    assert done.stderr.count("event=compiled") == 2
    kept = cache / "lamina" / "inductor"
    assert len(list(kept.rglob("*.so"))) >= 2
    assert shutil.which("openssl") is None or list((kept / "precompiled_headers").rglob("*.gch"))
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (kept.parent, kept)] == [0o700, 0o700]
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("home", [pytest.param(None, marks=needs_root), "/proc/none", "", "relative"])
def test_without_a_home_the_folder_is_one_of_the_process(home: str | None) -> None:
    """As for a user whom the password file does not know, whom some container platforms run everything as. The log
    says so once, and the folder is gone with the process."""
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch).chmod(0o777)

        done = run(NO_HOME, HOME=home, XDG_CACHE_HOME=None, TMPDIR=scratch)

        (line,) = done.stderr.splitlines()
        assert "level=warning" in line
        assert f"event=no_cache folder={done.stdout.strip()} reason=" in line
        assert Path(done.stdout.strip()).parent == Path(scratch)
        assert os.listdir(scratch) == []


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lamina"


@needs_root
@pytest.mark.parametrize("part", [".", "inductor"])
def test_the_folder_of_another_user_is_refused(part: str, cache: Path) -> None:
    """Also where it is the folder above; it could have been made first."""
    cache_folder("inductor")
    os.chown(cache / part, ANOTHER_USER, ANOTHER_USER)

    with pytest.raises(ConfigError, match=f"{cache / part}: belongs to another user, {ANOTHER_USER}, and"):
        cache_folder("inductor")


def test_a_folder_that_others_could_write_to_is_refused(cache: Path) -> None:
    """In a sentence, with status 2, by every command that uses the library."""
    cache_folder("inductor").chmod(0o770)

    done = subprocess.run(
        [sys.executable, "-m", "lamina", "convert", str(CHECKPOINT)], capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert done.stderr == (
        f"lamina: {cache / 'inductor'}: can be written to by other users, as its mode is 770, and Lamina executes what "
        "it keeps there; remove the folder, or set XDG_CACHE_HOME to a folder of your own\n"
    )


def test_a_folder_that_others_can_read_is_closed(cache: Path) -> None:
    """As older releases left it, and other tools that make folders there."""
    cache.mkdir(mode=0o755)
    (cache / "inductor").mkdir(mode=0o755)

    assert [stat.S_IMODE(p.stat().st_mode) for p in (cache_folder("inductor"), cache)] == [0o700, 0o700]


def test_a_file_in_place_of_the_folder_is_refused(cache: Path) -> None:
    """By name."""
    cache.mkdir()
    (cache / "inductor").touch()

    with pytest.raises(ConfigError, match=r"lamina/inductor: cannot be a cache folder: File exists; remove"):
        cache_folder("inductor")
