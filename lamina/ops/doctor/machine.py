"""This machine: what Lamina can use of it, and what keeps it from more."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import platform
import resource
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lamina.config import ClusterConfig
from lamina.errors import ConfigError
from lamina.ops.doctor.finding import Finding, State, guarded
from lamina.transport import Address, Options
from lamina.transport.choice import offers
from lamina.transport.lanes import UpgradeError
from lamina.transport.rdma.bindings import pyverbs
from lamina.transport.rdma.device import MIN_MEMLOCK

PATH_MTU = 4096
"""The largest that RDMA knows, in bytes."""
_FRAME_OVERHEAD = 104
"""What RoCE v2 over IPv6 needs of a network interface's MTU beside the path MTU, at least."""
_DESCRIPTORS = 1024
_CAP_IPC_LOCK = 14
_CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED = 124
_MAX_GPUS = 64


def look(config: ClusterConfig | None) -> list[Finding]:
    """Everything about this machine that concerns a node; ``config`` says what its cluster asks for."""
    links = config.links if config else Options()
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("software", software),
        ("processors", processors),
        ("attention kernel", kernel),
        ("NUMA", partial(numa, config)),
        ("huge pages", huge_pages),
        ("file descriptors", descriptors),
        ("GPU", partial(gpus, config)),
        ("RDMA devices", partial(rdma_devices, demanded=links.kind == "rdma")),
        ("locked memory", locked_memory),
        ("transports", partial(transports, links)),
    ]
    return [finding for item, check in checks for finding in guarded(item, check)]


def is_here(address: Address) -> bool:
    """Whether it is an address of this machine."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET) as s:
        s.bind((address.host, 0))
        return True
    return False


# -- software and processors


def software() -> Iterator[Finding]:
    versions = [f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in ("lamina", "torch"))]
    yield Finding("software", "ok", f"{', '.join(versions)}; {platform.system()} {platform.release()}")
    if _version("uvloop") == "missing":
        yield Finding("uvloop", "fail", "missing", "install lamina again: nodes run on it")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def processors(sys: Path = Path("/sys")) -> Iterator[Finding]:
    usable, total = len(os.sched_getaffinity(0)), os.cpu_count() or 0
    yield Finding("processors", "ok", f"{platform.machine()}, {usable} of {total} may be used")
    governors = {_text(file) for file in sys.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")}
    if not governors:
        yield Finding("CPU frequency", "none", "not governed by this system")
    elif governors == {"performance"}:
        yield Finding("CPU frequency", "ok", "governor performance")
    else:
        found = f"governor {', '.join(sorted(governors))}"
        advice = "cpupower frequency-set -g performance: processors that doze between messages answer late"
        yield Finding("CPU frequency", "warn", found, advice)


def kernel() -> Iterator[Finding]:
    from lamina.attention.native.library import available_isas, choose_isa

    try:
        isa = choose_isa()
    except ConfigError as e:
        # Memory nodes then attend by torch.
        yield Finding("attention kernel", "warn", str(e), "compile it: memory nodes are several times slower without")
        return
    yield Finding("attention kernel", "ok", f"compiled; takes {isa} of {', '.join(available_isas())}")


# -- memory


def numa(config: ClusterConfig | None) -> Iterator[Finding]:
    from lamina.attention.pool import numa_nodes

    nodes = sorted(numa_nodes())
    if len(nodes) < 2:
        yield Finding("NUMA", "ok", "one NUMA node")
        return
    state: State = "ok"
    advice = "run one memory node per NUMA node, each with numa = N (or --numa) and the cpus of that node"
    if config and any(is_here(n.address) and n.numa is None and n.cpus is None for n in config.memory_nodes):
        state = "warn"
    yield Finding("NUMA", state, f"{len(nodes)} NUMA nodes: {', '.join(map(str, nodes))}", advice)


def huge_pages(root: Path = Path("/")) -> Iterator[Finding]:
    text = _text(root / "sys/kernel/mm/transparent_hugepage/enabled")
    chosen = text.partition("[")[2].partition("]")[0]
    reserved = _meminfo(root, "HugePages_Total")
    found = f"transparent huge pages: {chosen or 'not supported'}; reserved: {reserved}, which Lamina does not use"
    if chosen in ("always", "madvise"):
        yield Finding("huge pages", "ok", found)
    elif not chosen:
        yield Finding("huge pages", "warn", found, "use a kernel that has them, for faster attention")
    else:
        advice = (
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: attention reads memory faster through them"
        )
        yield Finding("huge pages", "warn", found, advice)


def _meminfo(root: Path, key: str) -> int:
    lines = _text(root / "proc/meminfo").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)


def descriptors() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_limit(soft)} files may be open, {_limit(hard)} at most"
    if 0 <= soft < _DESCRIPTORS:
        yield Finding("file descriptors", "warn", found, f"ulimit -n {_DESCRIPTORS}, or LimitNOFILE= of a service")
    else:
        yield Finding("file descriptors", "ok", found)


def locked_memory() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    lines = _text(Path("/proc/self/status")).splitlines()
    capabilities = next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)
    needed = any(Path("/sys/class/infiniband").glob("*"))
    if capabilities >> _CAP_IPC_LOCK & 1:
        yield Finding("locked memory", "ok", "no limit, as this process has CAP_IPC_LOCK")
    elif soft == resource.RLIM_INFINITY:
        yield Finding("locked memory", "ok", "no limit")
    else:
        advice = "ulimit -l unlimited, or LimitMEMLOCK=infinity of a service: RDMA locks the memory that it moves"
        state: State = "none" if not needed else "fail" if soft < MIN_MEMLOCK else "warn"
        yield Finding("locked memory", state, f"at most {soft >> 10} KiB", advice if needed else "")


def _limit(value: int) -> str:
    return "any number of" if value == resource.RLIM_INFINITY else str(value)


# -- devices


def gpus(config: ClusterConfig | None) -> Iterator[Finding]:
    wanted = config is not None and config.front.device.startswith("cuda")
    devices = sorted(p.name for p in Path("/dev").glob("nvidia[0-9]*"))
    if not devices:
        if wanted and config and is_here(config.front.address):
            found = f"none, but {config.front.name} asks for {config.front.device}"
            yield Finding("GPU", "fail", found, "install the driver, or choose another device")
        else:
            yield Finding("GPU", "none", "no NVIDIA device")
        return
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield Finding("GPU", "ok", f"{names}; CUDA {torch.version.cuda}")
    else:
        advice = "install the driver that torch needs, or torch for CUDA"
        yield Finding("GPU", "warn", f"{', '.join(devices)}, which torch {_version('torch')} cannot use", advice)
    yield from _gpu_memory()


def _gpu_memory() -> Iterator[Finding]:
    """Whether a network card can reach the memory of a GPU: by dmabuf, or by the older module."""
    exported = _dmabuf_support()
    if exported and all(exported):
        yield Finding("GPU memory by RDMA", "ok", f"dmabuf on {len(exported)} of {len(exported)} devices")
    elif Path("/sys/module/nvidia_peermem").exists():
        yield Finding("GPU memory by RDMA", "warn", "by nvidia_peermem only", "use the open kernel modules, for dmabuf")
    else:
        found = f"dmabuf on {sum(exported)} of {len(exported)} devices; no nvidia_peermem"
        advice = "use the open kernel modules of the driver and Linux 5.12 or newer"
        yield Finding("GPU memory by RDMA", "none", found, advice)


def _dmabuf_support() -> list[bool]:
    """Of each GPU, from the driver; empty where it does not answer."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, device, answer = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for i in range(min(count.value, _MAX_GPUS)):
        failed = cuda.cuDeviceGet(ctypes.byref(device), i) or cuda.cuDeviceGetAttribute(
            ctypes.byref(answer), _CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED, device
        )
        found.append(not failed and bool(answer.value))
    return found


def rdma_devices(*, demanded: bool, root: Path = Path("/")) -> Iterator[Finding]:
    """Each port, by what the kernel says of it: no library is needed to see why there is none."""
    devices = sorted((root / "sys/class/infiniband").glob("*"))
    if not devices:
        advice = "install the card's driver (or, to try: rdma link add rxe0 type rxe netdev NAME)" if demanded else ""
        yield Finding("RDMA devices", "fail" if demanded else "none", "the kernel knows none", advice)
        return
    closed = [p for p in (root / "dev/infiniband").glob("uverbs*") if not os.access(p, os.R_OK | os.W_OK)]
    if closed:
        yield Finding("RDMA access", "fail", f"{closed[0]} may not be opened", "join the group of that file")
    elif not any((root / "dev/infiniband").glob("uverbs*")):
        yield Finding("RDMA access", "fail", "/dev/infiniband has no uverbs files", "modprobe ib_uverbs")
    try:
        pyverbs()
    except UpgradeError as e:
        found, _, advice = str(e).partition(": ")
        yield Finding("pyverbs", "fail" if demanded else "warn", f"{found}, so RDMA cannot be used", advice)
    else:
        yield Finding("pyverbs", "ok", "installed, and fits the system's libibverbs")
    ports = [port for device in devices for port in sorted((device / "ports").glob("*"))]
    findings = [_port(root, port) for port in ports]
    if demanded and not any(f.state == "ok" for f in findings):
        findings = [replace(f, state="fail") if f.state == "warn" else f for f in findings]
    yield from findings


def _port(root: Path, port: Path) -> Finding:
    item = f"{port.parent.parent.name} port {port.name}"
    layer = _text(port / "link_layer")
    state = _text(port / "state").partition(": ")[2]
    rate = _text(port / "rate")
    if state != "ACTIVE":
        hint = "bring its network interface up" if layer == "Ethernet" else "is the cable in, and does opensm run?"
        return Finding(item, "warn", f"{state or 'unknown state'}, {layer}", hint)
    if layer != "Ethernet":
        return Finding(item, "ok", f"ACTIVE, {layer}, {rate}, LID {_text(port / 'lid')}")
    gids = {int(file.name): _text(file) for file in (port / "gids").glob("*")}
    routable = [
        (i, address)
        for i, gid in sorted(gids.items())
        if "v2" in _text(port / f"gid_attrs/types/{i}") and (address := ipaddress.IPv6Address(gid).ipv4_mapped)
    ]
    interface = _text(port / f"gid_attrs/ndevs/{min(gids, default=0)}")
    mtu = int(_text(root / f"sys/class/net/{interface}/mtu") or 0) if interface else 0
    found = f"ACTIVE, {layer}, {rate}, {interface or 'no interface'} with MTU {mtu}"
    if not routable:
        return Finding(
            item, "warn", f"{found}, no GID of RoCE v2 with an IPv4 address", f"ip address add … dev {interface}"
        )
    index, address = routable[0]
    found += f", GID {index} is {address} (RoCE v2)"
    if mtu < PATH_MTU + _FRAME_OVERHEAD:
        advice = f"ip link set {interface} mtu 4200 or more, on switches too: RDMA then sends {PATH_MTU} bytes at once"
        return Finding(item, "warn", found, advice)
    return Finding(item, "ok", found)


def transports(links: Options) -> Iterator[Finding]:
    """What nodes here would offer to each other, from the transports themselves."""
    for name, offer in offers(links).items():
        missing = offer.get("missing")
        if missing is None:
            port = f" by {offer['device']} port {offer['port']}, MTU {offer['mtu']}" if name == "rdma" else ""
            yield Finding(f"transport {name}", "ok", f"can be used{port}")
        else:
            yield Finding(f"transport {name}", "none" if links.kind == "auto" else "fail", missing)


def _text(file: Path) -> str:
    """What a file of the kernel's says; empty where there is none, or it refuses, as it does for GIDs not in use."""
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""
