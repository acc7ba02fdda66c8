"""Read a cluster file and check it."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Any, get_args

import msgspec
from msgspec import Struct

from lamina.config.schema import (
    ClusterConfig,
    ComputeNodeConfig,
    MemoryNodeConfig,
    NodeConfig,
    PipelineConfig,
    RecoveryConfig,
)
from lamina.config.texts import format_range, format_size, text_fields
from lamina.errors import ConfigError
from lamina.limits import MAX_COMPUTE
from lamina.transport import Address
from lamina.validation import explain, unknown_key

_ROLES: dict[Any, type[Struct]] = {kind.role: kind for kind in get_args(NodeConfig)}


def load(path: str | Path) -> ClusterConfig:
    """Read and check a cluster file. A ConfigError says what is wrong and where."""
    path = Path(path)
    try:
        return _load(path)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e


def _load(path: Path) -> ClusterConfig:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ConfigError("not a text file in UTF-8") from e
    except (ValueError, RecursionError) as e:  # numbers and nesting that are too long for the parser, too
        raise ConfigError(f"not valid TOML: {e}") from e
    public = [key for key in ClusterConfig.__struct_fields__ if key not in ("file", "links")]
    for key in ("file", "links"):
        if key in raw:
            raise ConfigError(unknown_key(key, public))
    for name, kind in (("pipeline", PipelineConfig), ("recovery", RecoveryConfig)):
        if isinstance(table := raw.get(name), dict):
            _parse_texts(table, kind, name)
    for i, node in enumerate(raw["node"] if isinstance(raw.get("node"), list) else ()):
        if isinstance(node, dict):
            _parse_node(node, f"node[{i}]")
    try:
        config = msgspec.convert(raw, ClusterConfig)
    except msgspec.ValidationError as e:
        raise ConfigError(explain(e, raw, ClusterConfig)) from e
    links = config.transport.options(path.parent)
    config = msgspec.structs.replace(config, file=path, links=links)
    _check_addresses(config)
    _check_memory(config)
    _check_compute(config)
    return config


def _parse_node(table: dict[str, Any], at: str) -> None:
    """Parse the texts of a node. A missing or unknown role is left to the conversion, which names the known ones."""
    role = table.get("role")
    if role is None:
        keys = ["role", *dict.fromkeys(key for kind in _ROLES.values() for key in kind.__struct_encode_fields__)]
        for key in [key for key in table if key not in keys]:
            raise ConfigError(f"{at}: {unknown_key(key, keys)}")
    if not isinstance(role, str) or role not in _ROLES:
        return
    kind = _ROLES[role]
    others = {key for other in _ROLES.values() for key in other.__struct_fields__} - {*kind.__struct_fields__}
    for key, found in table.items():
        if key in others:
            raise ConfigError(f"{at}.{key}: expected no {key} on a {role} node, got {found!r:.200}")
    known = (*kind.__struct_encode_fields__, "role")
    for key in [key for key in table if key not in known]:  # before a key is missed that it was meant to be
        raise ConfigError(f"{at}: {unknown_key(key, known)}")
    _parse_texts(table, kind, at)


def _parse_texts(table: dict[str, Any], kind: type[Struct], at: str) -> None:
    """Replace each text of ``table`` by its value."""
    for key, text in text_fields(kind).items():
        if key not in table:
            if key in _required(kind):
                raise ConfigError(f"{at}.{key}: missing; expected {text.expected}")
            continue
        if not isinstance(table[key], str):
            raise ConfigError(f"{at}.{key}: expected {text.expected}, got {table[key]!r:.200}")
        try:
            table[key] = text.parse(table[key])
        except ConfigError as e:
            raise ConfigError(f"{at}.{key}: {e}") from e


def _required(kind: type[Struct]) -> Iterable[str]:
    return [field.name for field in msgspec.structs.fields(kind) if field.required]


def _check_addresses(config: ClusterConfig) -> None:
    """Names and addresses differ, other nodes can reach the addresses, and a secret guards those off this machine."""
    names: set[str] = set()
    owners: dict[tuple[str, int], str] = {}
    for i, node in enumerate(config.node):
        at, address = f"node[{i}]", node.address
        if node.name in names:
            raise ConfigError(f"{at}.name: {node.name!r} is used twice; names must differ")
        names.add(node.name)
        if _is_unspecified(address):
            raise ConfigError(
                f"{at}.address: expected an address that other nodes can reach, got {address}; "
                "where the node listens can be said apart, with listen"
            )
        for key, given in (("address", address), ("listen", node.bind)):
            if not given.is_loopback and config.links.secret is None:
                raise ConfigError(
                    f"{at}.{key}: {given} is not a loopback address, which needs a cluster secret: make one with "
                    '`lamina secret cluster.key` and set transport.secret_file = "cluster.key"'
                )
            if given.port == 0:
                raise ConfigError(f"{at}.{key}: expected a port from 1 to 65535, got {given}")
        if node.metrics is not None and node.metrics.port == 0:
            raise ConfigError(f"{at}.metrics: expected a port from 1 to 65535, got {node.metrics}")
        for key, own in (("address", address), ("metrics", node.metrics)):
            if own is None:
                continue
            place = _place(own)
            if place in owners:
                raise ConfigError(f"{at}.{key}: {own} is already the address of {owners[place]!r}")
            owners[place] = node.name


def _place(address: Address) -> tuple[str, int]:
    """The host and port of an address, equal for texts that mean the same."""
    host = address.host.lower()
    try:
        ip = ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        return host.removesuffix("."), address.port
    return str(getattr(ip, "ipv4_mapped", None) or ip), address.port


def _check_memory(config: ClusterConfig) -> None:
    for i, node in enumerate(config.node):
        if isinstance(node, MemoryNodeConfig) and node.quota is not None and node.quota > node.memory:
            raise ConfigError(
                f"node[{i}].quota: expected no more than the node's memory, {format_size(node.memory)}, "
                f"got {format_size(node.quota)}"
            )
    if not config.memory_nodes:
        raise ConfigError("node: expected at least one memory node, got none")


def _check_compute(config: ClusterConfig) -> None:
    """There are some, and not too many. Either all have layers, which follow each other, or none has.

    How many layers there are, the model will say.
    """
    compute = config.compute_nodes
    if not 1 <= len(compute) <= MAX_COMPUTE:
        raise ConfigError(f"node: expected 1 to {MAX_COMPUTE} compute nodes, got {len(compute)}")
    if all(n.layers is None for n in compute):
        return
    expected = 0
    for i, node in enumerate(config.node):
        if not isinstance(node, ComputeNodeConfig):
            continue
        at = f"node[{i}].layers"
        if node.layers is None:
            raise ConfigError(f"{at}: missing; where one compute node has layers, all must have some")
        if node.layers.start != expected:
            raise ConfigError(
                f"{at}: expected layers from {expected} on, after those of the compute node before, "
                f"got {format_range(node.layers)!r}"
            )
        expected = node.layers.stop


def _is_unspecified(address: Address) -> bool:
    """Whether the address means every address of the machine: a process can listen there, but cannot call it."""
    try:
        return ip_address(address.host).is_unspecified
    except ValueError:
        return False
