"""How much memory this machine has left, as the system's files tell."""

from __future__ import annotations

import re
from pathlib import Path


def available_bytes(numa: int | None = None, *, root: Path = Path("/")) -> dict[str, int]:
    """Return how many bytes are available without swapping, each with the place that limits them.

    The places are this machine, the control groups (version 2) of this process, and the NUMA node ``numa``. A place is
    left out if the system, whose files are below ``root``, says nothing about it. Cached files count as available:
    the system drops them when it needs their memory.
    """
    found = {}
    machine = numbers(root / "proc/meminfo", r"^(\w+):\s+(\d+) kB$")
    if "MemAvailable" in machine:
        found["on this machine"] = machine["MemAvailable"] * 1024
    group = re.search(r"^0::(/.*)$", text(root / "proc/self/cgroup"), re.MULTILINE)
    top = root / "sys/fs/cgroup"
    own = top / group[1].lstrip("/") if group else top
    for folder in (own, *own.parents):
        limit, used = text(folder / "memory.max").strip(), text(folder / "memory.current").strip()
        if limit.isdecimal() and used.isdecimal():
            kept = numbers(folder / "memory.stat", r"^(\w+) (\d+)$")
            files = kept.get("active_file", 0) + kept.get("inactive_file", 0)
            free = max(0, int(limit) - int(used) + files)
            found["in its control group"] = min(free, found.get("in its control group", free))
        if folder == top:
            break
    node = numbers(root / f"sys/devices/system/node/node{numa}/meminfo", r"^Node \d+ ([\w()]+):\s+(\d+) kB$")
    if numa is not None and "MemFree" in node:
        files = node.get("Active(file)", 0) + node.get("Inactive(file)", 0)
        found[f"on NUMA node {numa}"] = (node["MemFree"] + files) * 1024
    return found


def numbers(path: Path, pattern: str) -> dict[str, int]:
    """Read names and numbers from the lines of a file of the system."""
    return {name: int(number) for name, number in re.findall(pattern, text(path), re.MULTILINE)}


def text(path: Path) -> str:
    """Read a file of the system; return an empty text if there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""
