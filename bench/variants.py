"""The variants of transports that are measured, and how to set each up on this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec

from lamina.errors import TransportError
from lamina.transport import Options, RdmaOptions, TlsFiles
from lamina.transport.choice import offers
from lamina.transport.lanes import UpgradeError
from lamina.transport.rdma.ports import RdmaPort, find_port

VARIANTS = ("tcp", "tcp+tls", "shm", "shm+busy_poll", "rdma", "rdma+busy_poll")

PEER_TIMEOUT_S = 10.0
DEVICES = Path("/sys/class/infiniband")


class Setting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How both ends make their links, and where they run. It holds plain values, as it travels on command lines."""

    kind: str
    busy_poll: bool = False
    tls: str | None = None
    """The folder with ``node.key`` and ``node.pem``, a certificate that is its own authority."""
    devices: tuple[str, str] | None = None
    """The RDMA devices of the near and the far end."""
    cpus: tuple[int, int] = (-1, -1)
    """The processors of the near and the far end; -1 leaves an end unpinned."""

    def options(self, end: int) -> Options:
        """Return the options of the near end (0) or the far end (1)."""
        tls = None
        if self.tls is not None:
            certificate = Path(self.tls) / "node.pem"
            tls = TlsFiles(certificate, certificate.with_suffix(".key"), certificate)
        rdma = RdmaOptions(device=self.devices[end]) if self.devices else RdmaOptions()
        return Options(kind=self.kind, busy_poll=self.busy_poll, peer_timeout=PEER_TIMEOUT_S, tls=tls, rdma=rdma)

    def pin(self, end: int) -> None:
        """Pin this process to the processor of the near end (0) or the far end (1)."""
        pin(self.cpus[end])


def pin(cpu: int) -> None:
    """Pin this process to one processor; -1 changes nothing."""
    if cpu >= 0:
        os.sched_setaffinity(0, {cpu})


def find(variant: str, folder: Path, cpus: tuple[int, int], wanted: Sequence[str] = ()) -> Setting:
    """Return the setting of one of ``VARIANTS``. TransportError says why the variant cannot be used here.

    Certificates are generated in ``folder``. ``wanted`` names the RDMA device of both ends, or one for each end.
    """
    kind, _, way = variant.partition("+")
    if way == "busy_poll" and cpus[0] < 0:
        raise TransportError("busy polling needs a processor for each end, and this process may use only one")
    tls = devices = None
    if way == "tls":
        make_certificate(folder)
        tls = str(folder)
    if kind == "rdma":
        near, far = ports(wanted)
        devices = near.device, far.device
    setting = Setting(kind, busy_poll=way == "busy_poll", tls=tls, devices=devices, cpus=cpus)
    if why := offers(setting.options(0))[kind].get("missing"):
        raise TransportError(why)
    return setting


def two_processors() -> tuple[int, int]:
    """Return a processor for the near and the far end, of two cores if possible; -1 for both if there is only one."""
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        return -1, -1
    siblings = Path(f"/sys/devices/system/cpu/cpu{first}/topology/thread_siblings_list")
    twins = siblings.read_text().strip().replace("-", ",").split(",") if siblings.exists() else []
    return first, next((cpu for cpu in others if str(cpu) not in twins), others[0])


def ports(wanted: Sequence[str] = ()) -> tuple[RdmaPort, RdmaPort]:
    """Return a port for the near and the far end, of the devices ``wanted`` or of the first two that can be used.

    UpgradeError if none can be used.
    """
    if wanted:
        found = [find_port(RdmaOptions(device=name)) for name in wanted]
    else:
        found = [find_port(RdmaOptions())]
        for name in sorted(entry.name for entry in DEVICES.iterdir()):
            with contextlib.suppress(UpgradeError):
                if name != found[0].device:
                    found.append(find_port(RdmaOptions(device=name)))
    return found[0], found[min(1, len(found) - 1)]


def emulated(port: RdmaPort) -> bool:
    """Return whether the device is emulated by software, as Soft-RoCE is."""
    return "/virtual/" in os.path.realpath(DEVICES / port.device)


def make_certificate(folder: Path) -> None:
    """Generate ``node.pem`` and ``node.key`` in ``folder``. TransportError if that fails."""
    openssl = shutil.which("openssl")
    if openssl is None:
        raise TransportError("the command openssl, which generates the certificate, is not installed")
    request = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    files = ["-subj", "/CN=lamina", "-keyout", str(folder / "node.key"), "-out", str(folder / "node.pem")]
    done = subprocess.run([openssl, *request, *files], capture_output=True, text=True, check=False)
    if done.returncode:
        raise TransportError(f"openssl could not generate a certificate: {done.stderr.strip()[-300:]}")
