"""Write a cluster file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from lamina.config.read import load
from lamina.config.schema import ClusterConfig, ModelConfig, NodeConfig, PipelineConfig, RecoveryConfig, TransportConfig
from lamina.config.texts import text_fields
from lamina.errors import ConfigError


def write_cluster(
    file: Path,
    model: ModelConfig,
    nodes: Sequence[NodeConfig],
    *,
    pipeline: PipelineConfig | None = None,
    transport: TransportConfig | None = None,
    recovery: RecoveryConfig | None = None,
) -> ClusterConfig:
    """Write a cluster file and load it. Keys with their default values are left out.

    ConfigError if the file cannot be written, or if its parts do not fit together.
    """
    tables = [("[model]", _table(model))]
    for name, section in (("pipeline", pipeline), ("recovery", recovery), ("transport", transport)):
        if section is not None:
            tables.append((f"[{name}]", _table(section)))
    if transport is not None:
        tables.append(("[transport.rdma]", _table(transport.rdma)))
    tables += [("[[node]]", {"role": node.role, **_table(node)}) for node in nodes]
    text = "\n".join(_toml(header, table) for header, table in tables if table)
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{file}: cannot be written: {e.strerror}") from e
    except UnicodeEncodeError as e:
        raise ConfigError(f"{file}: cannot be written: {e.object[e.start : e.end]!r} is not Unicode") from e
    return load(file)


def _table(section: Struct) -> dict[str, Any]:
    """The keys of ``section`` that differ from their defaults, without the tables within it."""
    texts = text_fields(type(section))
    found = {}
    for field in msgspec.structs.fields(section):
        value = getattr(section, field.name)
        if value != field.default and not isinstance(value, Struct):
            found[field.name] = texts[field.name].format(value) if field.name in texts else value
    return found


def _toml(header: str, table: Mapping[str, Any]) -> str:
    return "".join(f"{line}\n" for line in (header, *(f"{key} = {_value(table[key])}" for key in table)))


def _value(value: str | int | float | bool) -> str:
    """A value in TOML: as in JSON, but for one character that must be escaped in addition."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
