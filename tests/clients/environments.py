"""An environment for each client program: its exact version, in a folder of its own, made when it is first needed.

``python -m tests.clients.environments [NAME ...]`` makes them without running a test, by default all.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("tests.clients")

ROOT = Path(__file__).parents[2]
INSTALL_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Client:
    """A program that is tested, and the packages that it needs, each with its version."""

    name: str
    packages: tuple[str, ...]
    """The first is the program itself."""
    npm: bool = False
    python: str = "3.11"
    """The oldest Python that it runs on."""

    @property
    def version(self) -> str:
        """The version of the program."""
        return self.packages[0].rsplit("@" if self.npm else "==", 1)[1]


CLIENTS = {
    client.name: client
    for client in (
        Client("litellm", ("litellm==1.110.2",)),
        Client("langchain", ("langchain-openai==1.7.4",)),
        Client("llm", ("llm==0.36",)),
        Client("instructor", ("instructor==1.17.0",)),
        Client("pydantic-ai", ("pydantic-ai-slim[openai]==2.68.0",)),
        Client("dspy", ("dspy==3.4.1",)),
        Client("smolagents", ("smolagents[openai]==1.26.0",)),
        Client("openai-agents", ("openai-agents==0.24.0",)),
        Client("llama-index", ("llama-index-llms-openai-like==0.8.1",)),
        Client("haystack", ("haystack-ai==3.4.1",)),
        Client("inspect-ai", ("inspect-ai==0.3.285", "openai==3.57.0")),
        Client("ai-sdk", ("ai@6.0.326", "@ai-sdk/openai-compatible@2.0.92"), npm=True),
        Client("lm-eval", ("lm-eval[hf,api]==0.4.13",)),
        Client("guidellm", ("guidellm==0.8.1",)),
        Client("aiperf", ("aiperf==0.13.0",)),
        Client("genai-bench", ("genai-bench==0.0.5",)),
        Client("evalscope", ("evalscope[perf]==1.14.1",)),
        Client("inference-perf", ("inference-perf==0.7.0",), python="3.12"),
    )
}


def folder_of(client: Client) -> Path:
    """The folder of a client's environment, in the user's cache, which nobody else may write to."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "lamina-tests" / "clients" / f"{client.name}-{client.version}"


def environment(name: str) -> Path:
    """The folder of the environment of a client, which is made if it is not there yet."""
    client = CLIENTS[name]
    folder, wanted = folder_of(client), json.dumps([sys.version, client.packages])
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _alone(folder.with_name(f"{folder.name}.lock")):
        complete = folder / "complete"  # is written last: what was interrupted is made anew
        if not complete.exists() or complete.read_text() != wanted:
            if folder.exists():
                shutil.rmtree(folder)
            log.info("making %s", folder)
            if client.npm:
                _make_npm(folder, client.packages)
            else:
                _make_venv(folder, client.packages, python_of(client) or sys.executable)
            complete.write_text(wanted)
    return folder


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Only one process at a time makes the same environment."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def python_of(client: Client) -> str | None:
    """A Python that is new enough for a client: this one, or one of the PATH or of pyenv; None if there is none."""
    least = tuple(map(int, client.python.split(".")))
    if sys.version_info >= least:
        return sys.executable
    pyenv = sorted(Path.home().glob(".pyenv/versions/3.*/bin/python3"))
    for python in (*(f"python3.{minor}" for minor in range(11, 16)), *map(str, pyenv)):
        new_enough = f"import sys, venv; sys.exit(sys.version_info < {least})"
        with suppress(OSError):
            if subprocess.run([python, "-P", "-c", new_enough], capture_output=True, check=False).returncode == 0:
                return python
    return None


def _make_venv(folder: Path, packages: Sequence[str], python: str) -> None:
    _run(python, "-m", "venv", str(folder))
    pip = (str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    constraints = folder / "constraints.txt"
    constraints.write_text(_torch())
    _run(*pip, "--no-compile", "--constraint", str(constraints), *packages)


def _torch() -> str:
    """Several programs pull torch in. Of this version, pip takes the build for CPUs where it is offered one."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def _make_npm(folder: Path, packages: Sequence[str]) -> None:
    folder.mkdir()
    pins = dict(package.rsplit("@", 1) for package in packages)
    (folder / "package.json").write_text(json.dumps({"private": True, "type": "module", "dependencies": pins}))
    _run("npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_TIMEOUT_S)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"


def main(names: Sequence[str]) -> None:
    """Make the environments of ``names``, or all, and say how long each took."""
    for name in names or CLIENTS:
        begun = time.monotonic()
        folder = environment(name)
        bytes_ = sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())
        sys.stdout.write(f"{name}: {time.monotonic() - begun:.0f} s, {bytes_ / 1e6:.0f} MB, {folder}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
