"""The native kernel under sanitizers, and its paths for other machines, by the conformance tests themselves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lamina.attention.native.build import BuildError, build, compiler

CONFORMANCE = [str(Path(__file__).with_name(name)) for name in ("test_backend.py", "test_stored.py", "test_moves.py")]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


@pytest.fixture(autouse=True)
def _a_compiler_is_there() -> None:
    try:
        compiler()
    except BuildError as error:
        pytest.skip(str(error))


def conformance(library: Path, chosen: str, **environment: str) -> None:
    """Run the fast conformance tests named by ``chosen`` over another build of the kernel, in their own process."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--timeout=1200",
        "-p",
        "no:cacheprovider",
        "-k",
        chosen,
        *CONFORMANCE,
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "LAMINA_NATIVE_LIBRARY": str(library), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0, report[-10_000:]
    assert re.search(r"\b[1-9]\d* passed", report), report[-10_000:]
    assert "Sanitizer" not in report, report[-10_000:]


def sanitizers() -> dict[str, str]:
    """What a process needs that loads a sanitized library into an interpreter without."""
    # libstdc++ too, because libasan looks for what it intercepts when the process starts.
    libraries = [
        subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("this C++ compiler comes without AddressSanitizer's library")
    return {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "LAMINA_TEST_EFFORT": "0.5",
    }


def test_the_kernel_is_clean_under_sanitizers(tmp_path: Path) -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer find nothing on any path that this machine can take."""
    environment = sanitizers()
    library = build(tmp_path / "sanitized.so", sanitize=True)
    assert b"__asan_init" in library.read_bytes()
    assert b"__ubsan_handle" in library.read_bytes()

    conformance(library, "native", **environment)


def test_the_wide_kernels_are_right_on_narrow_machines(tmp_path: Path) -> None:
    """The logic of the AVX-512 kernels, compiled for AVX2, passes the same tests."""
    library = build(tmp_path / "emulated.so", emulate=True)
    isas = subprocess.run(
        [sys.executable, "-c", "from lamina.attention.native.library import *; print(','.join(available_isas()))"],
        env={**os.environ, "LAMINA_NATIVE_LIBRARY": str(library)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if "avx512bf16" not in isas:
        pytest.skip(f"this machine has neither AVX-512 nor AVX2: {isas}")

    conformance(library, "native-avx512")


def test_the_wide_kernels_are_clean_under_sanitizers(tmp_path: Path) -> None:
    """The same, with sanitizers: what an AVX-512 kernel reads and writes is decided by the same logic."""
    environment = sanitizers()
    library = build(tmp_path / "both.so", sanitize=True, emulate=True)

    conformance(library, "native-avx512", **environment)
