"""Nodes that no cluster file names, from the options of the command line. Errors name the options."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from lamina.config import (
    Attention,
    ComputeNodeConfig,
    MemoryNodeConfig,
    TransportConfig,
    TransportKind,
    parse_device,
    parse_name,
    parse_size,
)
from lamina.errors import ConfigError
from lamina.log import Format
from lamina.node import daemon
from lamina.transport import Address, Options
from lamina.validation import option_name, parse_option


def links_of(links: dict[str, Any]) -> tuple[TransportConfig, Options]:
    """Return how a node without a cluster file makes links, from the options of the command line."""
    _require_known("transport", links["transport"], TransportKind)
    given = {key: value for key, value in links.items() if value is not None}
    transport = TransportConfig(kind=given.pop("transport", "auto"), **given)
    return transport, transport.options(Path(), option_name)


def memory_node_of(name: str | None, own: dict[str, Any], options: Options, *, joins: bool) -> MemoryNodeConfig:
    """Return a memory node without a cluster file, from the options of the command line."""
    if own["listen"] is None or own["memory"] is None:
        raise ConfigError("--listen and --memory: a memory node needs both, or CONFIG and --name")
    if own["device"] is not None:
        raise ConfigError("--device: not allowed for a memory node, which computes on the processors")
    _require_known("attention", own["attention"], Attention)
    memory = parse_option("memory", parse_size, own["memory"])
    given = _own(own, options, "memory", "attention")
    name = name or f"memory-{given['listen'].port}"
    if joins:
        parse_option("name", parse_name, name)
    return MemoryNodeConfig(name=name, **given | {"memory": memory})


def run_replica(
    front: Address,
    name: str | None,
    own: dict[str, Any],
    overrides: dict[str, Any],
    transport: TransportConfig,
    options: Options,
    format_: Format,
) -> int:
    """Run a compute node without a cluster file, from the options of the command line; return its exit status."""
    if own["listen"] is None or name is None:
        raise ConfigError("--listen and --name: a compute node with --join needs both")
    for key, given in (own | overrides).items():
        if key in ("memory", "attention", "numa") and given is not None:
            raise ConfigError(f"--{key}: not allowed for a compute node, which holds no KV cache")
    parse_option("name", parse_name, name)
    device_name = parse_option("device", parse_device, own["device"] or "cpu")
    node = ComputeNodeConfig(name=name, **_own(own, options) | {"device": device_name} | overrides)

    def make() -> daemon.Daemon:
        from lamina.node.replica import Replica
        from lamina.runtime.cpu import CpuDevice
        from lamina.runtime.sockets import Sockets

        device = CpuDevice(node.device, cpus=node.cpus, threads=node.threads)
        return daemon.Daemon(
            Replica(front, node, transport, node.options(options), device=device, network=Sockets()).serve
        )

    return daemon.run(name, make, format_)


def _own(own: dict[str, Any], options: Options, *more: str) -> dict[str, Any]:
    """Return the keys of a node without a cluster file, of those that nodes of both roles have, and ``more``."""
    given = {key: own[key] for key in ("threads", *more) if own[key] is not None}
    for key in ("listen", "address", "metrics"):
        if own[key] is not None:
            given[key] = parse_option(key, Address.parse, own[key])
    for key in ("listen", "address"):
        if key in given and not given[key].is_loopback and options.secret is None:
            raise ConfigError(
                f"--{key}: {given[key]} is not a loopback address, so it needs --secret-file with the secret of the "
                "cluster; `lamina secret` makes one"
            )
    return {"address": given["listen"]} | given


def _require_known(key: str, value: str | None, choices: Any) -> None:
    if value is not None and value not in (known := get_args(choices)):
        raise ConfigError(f"--{key}: expected one of {', '.join(known)}; got {value!r}")
