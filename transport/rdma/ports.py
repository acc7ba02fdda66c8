"""The ports of RDMA devices: which can be used, and how the peer addresses one."""

from __future__ import annotations

import contextlib
import ipaddress
from dataclasses import dataclass
from typing import Any

from lamina.transport.lanes import UpgradeError
from lamina.transport.options import MTUS, RdmaOptions
from lamina.transport.rdma.bindings import pyverbs
from lamina.transport.rdma.device import RdmaDevice, open_device


@dataclass(frozen=True)
class RdmaPort:
    """A usable port, and how the peer addresses it: an end's offer."""

    device: str
    port: int
    link_layer: str
    """``ethernet`` (RoCE v2) or ``infiniband``."""
    gid: str
    gid_index: int
    lid: int
    mtu: int
    """In bytes."""

    @classmethod
    def from_offer(cls, offer: dict[str, Any]) -> RdmaPort:
        """Check the peer's offer. Raises UpgradeError."""
        match offer:
            case {
                "device": str(device),
                "port": int(port),
                "link_layer": "ethernet" | "infiniband" as link_layer,
                "gid": str(gid),
                "gid_index": int(gid_index),
                "lid": int(lid),
                "mtu": int(mtu),
            } if 0 < port < 256 and 0 <= gid_index < 2**16 and 0 <= lid < 2**16 and mtu in MTUS:
                with contextlib.suppress(ValueError):
                    return cls(device, port, link_layer, ipaddress.IPv6Address(gid).exploded, gid_index, lid, mtu)
        raise UpgradeError(f"the peer's offer does not describe a port: {offer!r:.200}")

    @property
    def place(self) -> str:
        """The GID for messages: the IPv4 address where it contains one."""
        address = ipaddress.IPv6Address(self.gid)
        return str(address.ipv4_mapped or address)


def find_port(wanted: RdmaOptions) -> RdmaPort:
    """Find the first port that fits. UpgradeError says why the existing ports do not."""
    verbs = pyverbs()
    try:
        names = [device.name.decode() for device in verbs.get_device_list()]
    except verbs.Error:
        names = []
    if not names:
        raise UpgradeError("this machine has no RDMA device: check `rdma link`, and that the device's driver is loaded")
    if wanted.device is not None and wanted.device not in names:
        raise UpgradeError(f"there is no RDMA device {wanted.device!r}, only {', '.join(names)}: correct rdma.device")
    reasons: list[str] = []
    for name in [wanted.device] if wanted.device is not None else names:
        try:
            device = open_device(name)
        except UpgradeError as error:
            reasons.append(str(error))
            continue
        for number in [wanted.port] if wanted.port is not None else range(1, device.ports + 1):
            try:
                return _usable(device, number, wanted)
            except UpgradeError as error:
                reasons.append(str(error))
    raise UpgradeError("; ".join(reasons))


def _usable(device: RdmaDevice, number: int, wanted: RdmaOptions) -> RdmaPort:
    """Describe a port. Raises UpgradeError if it cannot be used."""
    e = pyverbs().e
    where = f"RDMA device {device.name}"
    if not 1 <= number <= device.ports:
        raise UpgradeError(f"{where} has no port {number}, only 1 to {device.ports}: correct rdma.port")
    where += f" port {number}"
    port = device.context.query_port(number)
    if port.state != e.IBV_PORT_ACTIVE:
        state = {e.IBV_PORT_DOWN: "down", e.IBV_PORT_INIT: "initialising", e.IBV_PORT_ARMED: "armed"}
        raise UpgradeError(
            f"{where} is {state.get(port.state, f'in state {port.state}')}, not active: check cable, "
            "switch and `ip link`, and on InfiniBand the subnet manager"
        )
    ethernet = port.link_layer == e.IBV_LINK_LAYER_ETHERNET
    mtu = MTUS[port.active_mtu - 1]
    if wanted.mtu is not None and wanted.mtu > mtu:
        raise UpgradeError(f"{where} has an MTU of {mtu} bytes, and rdma.mtu demands {wanted.mtu}: lower it, or raise "
                           "the MTU of the network")  # fmt: skip
    gids = {
        entry.gid_index: ipaddress.IPv6Address(device.context.query_gid(number, entry.gid_index).gid)
        for entry in device.context.query_gid_table(port.gid_tbl_len * device.ports)
        if entry.port_num == number and entry.gid_type == (e.IBV_GID_TYPE_ROCE_V2 if ethernet else e.IBV_GID_TYPE_IB)
    }
    if wanted.gid_index is not None:
        index = wanted.gid_index
    elif ethernet:
        index = min(gids, key=lambda i: (gids[i].ipv4_mapped is None, gids[i].is_link_local, i), default=0)
    else:
        index = 0
    if index not in gids:
        kind = "RoCE v2" if ethernet else "InfiniBand"
        there = ", ".join(f"{i} ({gid.ipv4_mapped or gid})" for i, gid in gids.items()) or "none"
        raise UpgradeError(
            f"{where} has no {kind} GID of index {index}; of this kind it has: {there}; "
            "correct rdma.gid_index, or give the interface an address"
        )
    return RdmaPort(
        device.name,
        number,
        "ethernet" if ethernet else "infiniband",
        gids[index].exploded,
        index,
        port.lid,
        wanted.mtu or mtu,
    )
