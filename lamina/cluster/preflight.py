"""What can be checked before any process of a cluster is started, in well under a second."""

from __future__ import annotations

import errno
import os
import socket

from lamina.attention.available import available_bytes
from lamina.config import ClusterConfig, NodeConfig, format_cpus, format_size
from lamina.errors import CapacityError, ConfigError, ConnectError
from lamina.model.checkpoint import check_checkpoint
from lamina.transport.choice import offers


def check(config: ClusterConfig) -> None:
    """Raise the LaminaError that the nodes of ``config`` would end with, if all of them were started here.

    Checked are addresses, processors, devices of the transport, memory and the checkpoint.
    """
    for node in config.node:
        _check_address(config, node)
        _check_cpus(config, node)
        _check_transport(config, node)
    _check_memory(config)
    check_checkpoint(config.model_path)


def _check_address(config: ClusterConfig, node: NodeConfig) -> None:
    """The node can listen: the address is one of this machine, and no process uses its port."""
    at = node.bind
    try:
        found = socket.getaddrinfo(at.host, at.port, type=socket.SOCK_STREAM)
    except OSError as e:
        raise ConfigError(f"{config.file}: node {node.name}: {at}: {e.strerror}") from e
    family, _, _, _, place = found[0]
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(place)
            listening.listen(1)
    except OSError as e:
        if isinstance(e, PermissionError):
            hint = "; take a port from 1024 on"
        elif e.errno == errno.EADDRINUSE:
            hint = "; is this cluster running already?"
        else:
            hint = "; nodes of other machines are started there, with `lamina node`"
        raise ConnectError(f"node {node.name} cannot listen at {at}: {(e.strerror or str(e)).lower()}{hint}") from e


def _check_cpus(config: ClusterConfig, node: NodeConfig) -> None:
    usable = os.sched_getaffinity(0)
    if node.cpus and (missing := node.cpus - usable):
        raise ConfigError(
            f"{config.file}: node {node.name}: cpus: this machine has no processors {format_cpus(missing)}; "
            f"expected some of {format_cpus(usable)}"
        )


def _check_transport(config: ClusterConfig, node: NodeConfig) -> None:
    """The transport that the file demands is possible; ``auto`` demands none."""
    options = config.options(node)
    missing = offers(options).get(options.kind, {}).get("missing")
    if missing:
        raise ConfigError(f'{config.file}: node {node.name}: transport.kind "{options.kind}" is impossible: {missing}')


def _check_memory(config: ClusterConfig) -> None:
    """The memory of all nodes together is there, as each takes all of its own when it starts."""
    asked = sum(node.memory for node in config.memory_nodes)
    for where, available in available_bytes().items():
        if asked > available:
            names = ", ".join(node.name for node in config.memory_nodes)
            raise CapacityError(
                f"{config.file}: memory: {_about(asked)} for {names} cannot be had: "
                f"{_about(available)} are available {where}"
            )


def _about(nbytes: int) -> str:
    """The text of a size, which need not be exact."""
    return f"{nbytes / 2**30:.1f}GiB" if nbytes >= 2**30 else format_size(nbytes)
