"""Checks of this machine: what Lamina can use, and what slows it down."""

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

from lamina import __version__
from lamina.config import ClusterConfig
from lamina.errors import ConfigError
from lamina.ops.doctor.finding import Finding, State, guarded
from lamina.transport import Address, Options
from lamina.transport.choice import offers
from lamina.transport.endpoints import loopback_name
from lamina.transport.lanes import UpgradeError
from lamina.transport.rdma.bindings import pyverbs
from lamina.transport.rdma.device import MIN_MEMLOCK

PATH_MTU = 4096
"""The largest path MTU of RDMA, in bytes."""
_FRAME_OVERHEAD = 104
"""How much larger than the path MTU the MTU of a network interface must be for RoCE v2 over IPv6."""
_DESCRIPTORS = 1024
_CAP_IPC_LOCK = 14
_CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED = 124
_MAX_GPUS = 64


def look(config: ClusterConfig | None) -> list[Finding]:
    """Return all findings about this machine; ``config`` holds the demands of its cluster."""
    links = config.links if config else Options()
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("software", software),
        ("processors", processors),
        ("attention kernel", kernel),
        ("compiling", partial(compiling, config)),
        ("NUMA", partial(numa, config)),
        ("huge pages", huge_pages),
        ("file descriptors", descriptors),
        ("GPU", partial(gpus, config)),
        ("RDMA devices", partial(rdma_devices, demanded=links.kind == "rdma")),
        ("locked memory", locked_memory),
        ("transports", partial(transports, links)),
        ("addresses", partial(addresses, config)),
    ]
    return [finding for item, check in checks for finding in guarded(item, check)]


def is_here(address: Address) -> bool:
    """Return whether ``address`` belongs to this machine."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET) as s:
        s.bind((address.host, 0))
        return True
    return False


# -- addresses


def addresses(config: ClusterConfig | None) -> Iterator[Finding]:
    """Find nodes whose host name is a loopback address on this machine: Debian gives a machine's own name one."""
    for node in config.node if config else ():
        place = _resolved(node.bind)
        if place and place.is_loopback and not node.bind.is_loopback:
            yield Finding(f"address of {node.name}", "warn", *loopback_name(node.bind, str(place)).split(": ", 1))


def _resolved(address: Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        places = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError:
        return None
    return ipaddress.ip_address(str(places[0][4][0]).partition("%")[0])


# -- software and processors


def software() -> Iterator[Finding]:
    versions = [f"Python {platform.python_version()}", f"lamina {__version__}", f"torch {_version('torch')}"]
    yield Finding("software", "ok", f"{', '.join(versions)}; {platform.system()} {platform.release()}")
    if _version("uvloop") == "missing":
        yield Finding("uvloop", "fail", "missing", "install lamina again; nodes need uvloop")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def processors(sys: Path = Path("/sys")) -> Iterator[Finding]:
    usable, total = len(os.sched_getaffinity(0)), os.cpu_count() or 0
    yield Finding("processors", "ok", f"{platform.machine()}, {usable} of {total} are usable")
    governors = {_text(file) for file in sys.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")}
    if not governors:
        yield Finding("CPU frequency", "none", "this system has no frequency governor")
    elif governors == {"performance"}:
        yield Finding("CPU frequency", "ok", "governor performance")
    else:
        found = f"governor {', '.join(sorted(governors))}"
        advice = "cpupower frequency-set -g performance; idle processors otherwise wake up late for messages"
        yield Finding("CPU frequency", "warn", found, advice)


def kernel() -> Iterator[Finding]:
    from lamina.attention.native.library import available_isas, choose_isa

    try:
        isa = choose_isa()
    except ConfigError as e:
        # Memory nodes then use torch for attention.
        yield Finding(
            "attention kernel", "warn", str(e), "compile it; memory nodes are several times slower without it"
        )
        return
    yield Finding("attention kernel", "ok", f"compiled; uses {isa}, out of {', '.join(available_isas())}")


def compiling(config: ClusterConfig | None) -> Iterator[Finding]:
    """Check that compute nodes on this machine can compile what they run."""
    if config and not (config.model.compile and any(is_here(n.address) for n in config.compute_nodes)):
        yield Finding("compiling", "none", "no compute node here compiles")
        return
    from lamina.model.functions import compile_trouble

    if trouble := compile_trouble():
        reason, _, advice = trouble.partition("; ")
        found = f"{reason}, so compute nodes run the model uncompiled, which is slower"
        yield Finding("compiling", "warn", found, f"{advice}; model.compile = false accepts it")
    else:
        yield Finding("compiling", "ok", "a C++ compiler and its headers are there")


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
        yield Finding("huge pages", "warn", found, "use a kernel with huge pages, for faster attention")
    else:
        advice = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled; attention reads huge pages faster"
        yield Finding("huge pages", "warn", found, advice)


def _meminfo(root: Path, key: str) -> int:
    lines = _text(root / "proc/meminfo").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)


def descriptors() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_limit(soft)} open files allowed, can be raised to {_limit(hard)}"
    if 0 <= soft < _DESCRIPTORS:
        yield Finding("file descriptors", "warn", found, f"ulimit -n {_DESCRIPTORS}, or LimitNOFILE= in a service")
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
        advice = "ulimit -l unlimited, or LimitMEMLOCK=infinity in a service; RDMA locks the memory that it uses"
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
        advice = "install the driver that torch needs, or a torch with CUDA"
        yield Finding("GPU", "warn", f"{', '.join(devices)}, which torch {_version('torch')} cannot use", advice)
    yield from _gpu_memory()


def _gpu_memory() -> Iterator[Finding]:
    """Check whether a network card can access the memory of a GPU: by dmabuf, or by the older nvidia_peermem."""
    exported = _dmabuf_support()
    if exported and all(exported):
        yield Finding("GPU memory by RDMA", "ok", f"dmabuf on {len(exported)} of {len(exported)} devices")
    elif Path("/sys/module/nvidia_peermem").exists():
        yield Finding(
            "GPU memory by RDMA", "warn", "only by nvidia_peermem", "use the open kernel modules, which support dmabuf"
        )
    else:
        found = f"dmabuf on {sum(exported)} of {len(exported)} devices; no nvidia_peermem"
        advice = "use the open kernel modules of the driver and Linux 5.12 or newer"
        yield Finding("GPU memory by RDMA", "none", found, advice)


def _dmabuf_support() -> list[bool]:
    """Ask the driver whether each GPU supports dmabuf; empty if there is no driver."""
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
    """Report each port from the kernel's files, so that no library is needed to see what is missing."""
    devices = sorted((root / "sys/class/infiniband").glob("*"))
    if not devices:
        advice = (
            "install the driver of the card (or, for a trial: rdma link add rxe0 type rxe netdev NAME)"
            if demanded
            else ""
        )
        yield Finding("RDMA devices", "fail" if demanded else "none", "the kernel lists none", advice)
        return
    closed = [p for p in (root / "dev/infiniband").glob("uverbs*") if not os.access(p, os.R_OK | os.W_OK)]
    if closed:
        yield Finding("RDMA access", "fail", f"no permission to open {closed[0]}", "join the group of that file")
    elif not any((root / "dev/infiniband").glob("uverbs*")):
        yield Finding("RDMA access", "fail", "/dev/infiniband has no uverbs files", "modprobe ib_uverbs")
    try:
        pyverbs()
    except UpgradeError as e:
        found, _, advice = str(e).partition(": ")
        yield Finding("pyverbs", "fail" if demanded else "warn", f"{found}, so RDMA cannot be used", advice)
    else:
        yield Finding("pyverbs", "ok", "installed, and matches the system's libibverbs")
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
        hint = (
            "bring its network interface up"
            if layer == "Ethernet"
            else "check that the cable is plugged in and that opensm runs"
        )
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
            item, "warn", f"{found}, no GID of RoCE v2 with an IPv4 address", f"ip address add ADDRESS dev {interface}"
        )
    index, address = routable[0]
    found += f", GID {index} is {address} (RoCE v2)"
    if mtu < PATH_MTU + _FRAME_OVERHEAD:
        advice = f"ip link set {interface} mtu 4200 or more, also on switches; RDMA then sends {PATH_MTU} bytes at once"
        return Finding(item, "warn", found, advice)
    return Finding(item, "ok", found)


def transports(links: Options) -> Iterator[Finding]:
    """Report the transports that nodes on this machine would offer, as the transports themselves state."""
    for name, offer in offers(links).items():
        missing = offer.get("missing")
        if missing is None:
            port = f" by {offer['device']} port {offer['port']}, MTU {offer['mtu']}" if name == "rdma" else ""
            yield Finding(f"transport {name}", "ok", f"usable{port}")
        else:
            yield Finding(f"transport {name}", "none" if links.kind == "auto" else "fail", missing)


def _text(file: Path) -> str:
    """Return the text of a kernel file; empty if it is missing or unreadable, as files of unused GIDs are."""
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""
