#!/usr/bin/env python3
"""Run a command where there is RDMA: under a user-mode Linux kernel with two Soft-RoCE devices.

    tests/rdma/uml.py [--mem MIB] [--timeout S] [--env NAME=VALUE]... [--dir DIR] [--share DIR]... -- COMMAND...
    tests/rdma/uml.py --install     install the Debian packages that this needs, and let programs be large (as root)
    tests/rdma/uml.py --build       build the kernel, unless it is there

No RDMA hardware, module or right of root is needed: the kernel is an ordinary program. It is built once, from Debian's
source, ``kernel.config`` and ``PATCHES``, and kept in ``$LAMINA_UML_CACHE`` (``~/.cache/lamina/uml``). ``--build``
builds it again when one of the three has changed; running a command does so for the latter two only.

COMMAND sees this machine's files. What it writes is kept in memory and forgotten, except below a ``--share`` folder.
It runs as root in ``--dir`` (the current folder), with an empty standard input and a bare environment. Its standard
output, standard error and exit status are this program's. 124 means that it ran past ``--timeout`` seconds, 125 that
it could not be run, 127 that it was not found. What it leaves running ends with it.

Under the kernel:

- devices ``rxe0`` (10.77.0.1, on ``veth0``) and ``rxe1`` (10.77.0.2, on ``veth1``), with an MTU of 4096; GID 1 is the
  IPv4 address. Packets between the two cross the cable: ``tc qdisc add dev veth0 root netem loss 3%`` loses some;
- no other network but ``lo``;
- Debian's pyverbs, and nothing else of Debian's Python packages, for any CPython of the same version as Debian's;
- one processor. Who polls instead of waiting for completion events takes it from Soft-RoCE itself.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "kernel.config"
GUEST = HERE / "guest.sh"
PACKAGES = (HERE / "packages.txt").read_text().split()
SOURCE = "linux-source-6.12"  # Debian 12 and 13 have it
PYTHON_PACKAGES = "/run/lamina/python"  # made by guest.sh

# File of the source, text in it, what replaces it.
# The kernel keeps a program's vector registers in as many bytes as AVX-512 takes. Linux outside accepts all registers
# of the processor or none, so no program would start where there are more: AMX makes it 11,008 bytes.
PATCHES = [("arch/x86/um/user-offsets.c", "DEFINE_LONGS(HOST_FP_SIZE, 2696)", "DEFINE_LONGS(HOST_FP_SIZE, 12288)")]

TIMED_OUT, CANNOT_RUN = 124, 125
SHOWN_LINES = 30  # of a log, when something fails

# To the kernel outside, nearly every page of a program under this one is a mapping of its own. Beyond the limit, which
# is 65530 unless changed, that program dies; torch comes near it.
MAPPINGS, MAPPINGS_FILE = 1 << 20, Path("/proc/sys/vm/max_map_count")


class CannotRunError(Exception):
    """The command was not run; says why, and what to do."""


def main() -> int:
    options = parse_arguments()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_on_signal)
    try:
        if options.install:
            install()
            return 0
        if missing := missing_packages():
            raise CannotRunError(
                f"packages are missing: {' '.join(missing)}; `make rdma-packages` as root installs them"
            )
        if options.build:
            build_kernel()
            return 0
        return run(find_kernel() or build_kernel(), options)
    except CannotRunError as error:
        say(str(error))
        return CANNOT_RUN


def parse_arguments() -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser("uml.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mem", type=int, default=3072, metavar="MIB", help="memory; only what is touched is taken")
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds until the command is killed")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable of the command")
    parser.add_argument("--dir", type=Path, default=Path(), help="where the command runs")
    parser.add_argument("--share", type=Path, action="append", default=[], help="a folder in which writes are kept")
    parser.add_argument("--install", action="store_true", help="install the Debian packages that this needs")
    parser.add_argument("--build", action="store_true", help="build the kernel, unless it is there")
    parser.add_argument("command", nargs="*", metavar="COMMAND")
    options = parser.parse_args()
    if bool(options.command) == (options.install or options.build):
        parser.error("either a COMMAND after --, or --install, or --build")
    for variable in options.env:
        if "=" not in variable:
            parser.error(f"--env {variable}: must be NAME=VALUE")
    for folder in (options.dir, *options.share):
        if not folder.is_dir():
            parser.error(f"{folder}: no such folder")
    return options


def end_on_signal(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)  # through every finally


def say(message: str) -> None:
    sys.stderr.write(f"uml.py: {message}\n")


# ---- Packages


def missing_packages() -> list[str]:
    """Which of ``packages.txt`` are not installed. Raises CannotRunError on a machine that cannot have them."""
    if not shutil.which("dpkg-query") or platform.machine() != "x86_64":
        raise CannotRunError(
            "the kernel and pyverbs come from Debian 12 or 13 on x86_64; elsewhere, run this in a container of it"
        )
    listing = subprocess.run(
        ["/usr/bin/dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n", *PACKAGES],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # names that dpkg has never heard of
        text=True,
    ).stdout
    return [name for name in PACKAGES if f"{name} installed" not in listing.splitlines()]


def install() -> None:
    """Install what is missing, and raise the limit of mappings. Raises CannotRunError if that needs root, or fails."""
    if not room_for_torch():
        try:
            MAPPINGS_FILE.write_text(str(MAPPINGS))
        except OSError as error:
            raise CannotRunError(f"run as root: sysctl vm.max_map_count={MAPPINGS} ({error.strerror})") from error
        say(f"set vm.max_map_count to {MAPPINGS} until the next boot")
    missing = missing_packages()
    if not missing:
        return
    update, add = ("apt-get", "update"), ("apt-get", "install", "--yes", "--no-install-recommends", *missing)
    if os.geteuid() != 0:
        raise CannotRunError(f"run as root: {shlex.join(update)} && {shlex.join(add)}")
    say(f"installing {' '.join(missing)}")
    with tempfile.TemporaryFile() as log:
        for command in (update, add):
            call(log, "env", "DEBIAN_FRONTEND=noninteractive", *command)


def room_for_torch() -> bool:
    """Whether programs with torch can run under the kernel."""
    return int(MAPPINGS_FILE.read_text()) >= MAPPINGS


# ---- The kernel


def find_kernel() -> Path | None:
    """The newest kernel that has been built with these ``kernel.config`` and ``PATCHES``, of whichever source."""
    built = kernel_file("*")
    return max(built.parent.glob(built.name), key=lambda kernel: kernel.stat().st_mtime, default=None)


def kernel_file(version: str) -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(os.environ.get("LAMINA_UML_CACHE") or caches / "lamina" / "uml")
    config = hashlib.sha256(CONFIG.read_bytes() + repr(PATCHES).encode()).hexdigest()
    return cache.resolve() / f"linux-{version}-{config[:12]}"


def build_kernel() -> Path:
    """The kernel of the source that apt offers, from the cache or built now. Raises CannotRunError."""
    offered = subprocess.run(
        ["/usr/bin/apt-cache", "show", "--no-all-versions", SOURCE], capture_output=True, text=True
    ).stdout
    versions = [line.removeprefix("Version: ") for line in offered.splitlines() if line.startswith("Version: ")]
    if not versions:
        raise CannotRunError(f"apt offers no {SOURCE}, which Debian 12 and 13 have: try apt-get update")
    kernel = kernel_file(versions[0])
    if kernel.exists():
        return kernel
    cache = kernel.parent
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for somebody else who builds the kernel")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if kernel.exists():
            return kernel
        for stale in cache.glob("build-*"):  # of one who was killed
            shutil.rmtree(stale)
        with tempfile.TemporaryDirectory(prefix="build-", dir=cache) as folder:
            build_in(Path(folder)).rename(kernel)
    return kernel


def build_in(folder: Path) -> Path:
    """Build the kernel below ``folder``, which takes 2 GB; the file."""
    began = time.monotonic()
    tree = folder / SOURCE
    make = ("make", f"--directory={tree}", f"--jobs={os.cpu_count()}", "ARCH=um")

    def tell(what: str) -> None:
        say(f"{time.monotonic() - began:4.0f} s: {what}")

    tell("building the user-mode kernel, once, in about three minutes: downloading its source (150 MB)")
    with (folder / "log").open("w+b") as log:
        call(log, "apt-get", "download", SOURCE, cwd=folder)
        tell("unpacking")
        (package,) = folder.glob("*.deb")
        call(log, "dpkg-deb", "--extract", package, folder)
        call(log, "tar", "--extract", f"--directory={folder}", "--file", folder / f"usr/src/{SOURCE}.tar.xz")
        for name, old, new in PATCHES:
            text = (tree / name).read_text()
            if text.count(old) != 1:
                raise CannotRunError(f"{SOURCE} has not one {old!r} in {name}: adapt PATCHES in {__file__}")
            (tree / name).write_text(text.replace(old, new))
        tell("configuring")
        call(log, "env", f"KCONFIG_ALLCONFIG={CONFIG}", *make, "allnoconfig")
        honoured = (tree / ".config").read_text().splitlines()
        wanted = [line for line in CONFIG.read_text().splitlines() if line.startswith("CONFIG_")]
        if refused := [line for line in wanted if line not in honoured]:
            raise CannotRunError(f"{SOURCE} does not honour these lines of {CONFIG}: {' '.join(refused)}")
        tell("compiling")
        call(log, *make, "linux")
    tell("built")
    return tree / "linux"


# ---- Running under it


def run(kernel: Path, options: argparse.Namespace) -> int:
    """The status of the command. Raises CannotRunError if it has none."""
    with tempfile.TemporaryDirectory(prefix="lamina-uml-") as name:
        talk = Path(name)
        shutil.copy(GUEST, talk / "init")  # the checkout's path may have characters that the kernel's arguments cannot
        write_request(talk / "request", options)
        first_processor = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        (talk / "cpuinfo").write_text(f"{first_processor}\n\n")
        with (talk / "console").open("w+b") as console:
            try:
                state = boot(kernel, talk, console, options.mem, options.timeout)
            except subprocess.TimeoutExpired:
                say(f"killed: it ran past {options.timeout:g} s")
                return TIMED_OUT
            with contextlib.suppress(FileNotFoundError):
                return int((talk / "status").read_text())
            raise CannotRunError(
                f"the kernel ended (status {state}) and left none of the command's:\n{end_of(console)}"
            )


def write_request(file: Path, options: argparse.Namespace) -> None:
    """What ``guest.sh`` reads."""
    environment = {
        "HOME": os.environ.get("HOME", "/root"),
        "LANG": "C.UTF-8",
        "PATH": os.environ.get("PATH", os.defpath),
        **dict(variable.split("=", 1) for variable in options.env),
    }
    environment["PYTHONPATH"] = ":".join(filter(None, [PYTHON_PACKAGES, environment.get("PYTHONPATH")]))
    lists = {
        "shares": [str(share.resolve()) for share in options.share],
        "environment": [f"{name}={value}" for name, value in environment.items()],
        "command": options.command,
    }
    lines = [f"directory={shlex.quote(str(options.dir.resolve()))}"]
    lines += [f"{name}=({shlex.join(values)})" for name, values in lists.items()]
    file.write_text("\n".join(lines) + "\n", errors="surrogateescape")


def boot(kernel: Path, talk: Path, console: IO[bytes], mem: int, timeout_s: float) -> int:
    """Run the kernel to its end; its status. Raises subprocess.TimeoutExpired."""
    outputs = {number: os.pipe() for number in (1, 2)}
    ends = [write for _, write in outputs.values()]
    arguments = (
        *(f"mem={mem}M", "rootfstype=hostfs", "rootflags=/", "ro", "quiet", "panic=-1", f"uml_dir={talk}"),
        *("con=null", "con0=null,fd:1", "ssl=null", f"ssl0=null,fd:{ends[0]}", f"ssl1=null,fd:{ends[1]}"),
        *(f"init={talk / 'init'}", f"talk={talk}"),
    )
    with process_group(kernel, *arguments, stdout=console, stderr=console, pass_fds=ends) as process:
        for end in ends:
            os.close(end)
        copies = [
            threading.Thread(target=copy, args=(read, number, process), daemon=True)
            for number, (read, _) in outputs.items()
        ]
        for thread in copies:
            thread.start()
        state = process.wait(timeout_s)
    for thread in copies:
        thread.join()
    return state


def copy(source: int, target: int, process: subprocess.Popen[bytes]) -> None:
    """All bytes from ``source`` to ``target``. Where nobody reads any more, the process ends."""
    with contextlib.closing(os.fdopen(source, "rb", buffering=0)) as reader:
        while chunk := reader.read(1 << 16):
            try:
                while chunk:
                    chunk = chunk[os.write(target, chunk) :]
            except BrokenPipeError:
                process.kill()
                return


# ---- Processes


@contextlib.contextmanager
def process_group(*command: str | Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, which is killed at the end of the block."""
    # Should this process be killed at once, then setpriv's promise holds instead.
    dying_with_us = ("setpriv", "--pdeathsig", "KILL", "--")
    process = subprocess.Popen([*dying_with_us, *command], stdin=subprocess.DEVNULL, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def call(log: IO[bytes], *command: str | Path, **options: Any) -> None:
    """Run a command to its end. Raises CannotRunError with the end of its log if it fails."""
    with process_group(*command, stdout=log, stderr=log, **options) as process:
        if process.wait():
            raise CannotRunError(f"{shlex.join(map(str, command))} failed:\n{end_of(log)}")


def end_of(log: IO[bytes]) -> str:
    log.seek(0)
    return "\n".join(log.read().decode(errors="replace").splitlines()[-SHOWN_LINES:])


if __name__ == "__main__":
    sys.exit(main())
