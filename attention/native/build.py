"""Compile the native library with the machine's C++ compiler, which needs only the standard library.

The package's build runs this; to run it by hand: ``python -m lamina.attention.native.build``.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = HERE / "liblamina_attention.so"

FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-fno-strict-aliasing",  # buffers hold numbers of different types in turn
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
X86 = {
    "avx2": AVX2,
    "avx512": [*AVX512, "-DLAMINA_WIDE=1"],
    "avx512bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16", "-DLAMINA_WIDE=1", "-DLAMINA_BFLOAT16=1"],
}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"]


class BuildError(Exception):
    """There is no compiler, or it failed: the text says which of these, and what to do."""


def compiler() -> str:
    """Return the C++ compiler: ``$CXX``, or else c++, g++ or clang++. `BuildError` if there is none."""
    chosen = os.environ.get("CXX")
    if chosen and not shutil.which(chosen):
        raise BuildError(f"$CXX names {chosen!r}, which is not there; set it to a C++ compiler, or not at all")
    for name in (chosen, "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("no C++ compiler found (c++, g++, clang++); install one, such as g++")


def build(output: Path = LIBRARY, *, sanitize: bool = False, emulate: bool = False) -> Path:
    """Compile into ``output``; `BuildError` if that fails.

    ``sanitize`` adds AddressSanitizer and UndefinedBehaviorSanitizer. ``emulate`` compiles the AVX-512 kernels for
    AVX2, so that their logic can be tested where the instructions are missing.
    """
    cxx = compiler()
    isas = {"portable": [], **(X86 if platform.machine() in ("x86_64", "AMD64") else {})}
    common = [*FLAGS, *(SANITIZE if sanitize else []), *(["-DLAMINA_EMULATE=1"] if emulate else [])]
    with tempfile.TemporaryDirectory(prefix="lamina-build-") as folder:
        jobs = {"workers": [*common, str(HERE / "workers.cpp")]}
        for isa, flags in isas.items():
            if emulate and isa.startswith("avx512"):
                flags = [*AVX2, *(flag for flag in flags if flag.startswith("-D"))]
            jobs[isa] = [*common, *flags, f"-DLAMINA_ISA={isa}", str(HERE / "kernel.cpp")]
        objects = [str(Path(folder) / f"{name}.o") for name in jobs]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job, o: _run([cxx, "-c", *job, "-o", o]), jobs.values(), objects))
        made = Path(folder) / output.name
        _run([cxx, "-shared", "-pthread", *(SANITIZE if sanitize else []), *objects, "-o", str(made)])
        shutil.copyfile(made, _beside(output))
    os.replace(_beside(output), output)  # processes that have the old one mapped keep it
    return output


def _beside(output: Path) -> Path:
    return output.with_name(f".{output.name}.{os.getpid()}")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{build()}\n")
    except BuildError as e:
        sys.exit(f"lamina: {e}")
