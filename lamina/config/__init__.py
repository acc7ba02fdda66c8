"""The file that wires a cluster: its types, and how it is read and written.

After loading, nothing reads the file or the environment again. Every message names the file, the place in it, what
was expected and what was found.
"""

from lamina.config.read import load
from lamina.config.schema import (
    Attention,
    ClusterConfig,
    ComputeNodeConfig,
    Dtype,
    MemoryNodeConfig,
    ModelConfig,
    NodeConfig,
    PipelineConfig,
    RdmaConfig,
    RecoveryConfig,
    TransportConfig,
    TransportKind,
)
from lamina.config.secret import read_private, read_secret, write_secret
from lamina.config.texts import (
    format_cpus,
    format_range,
    format_size,
    parse_cpus,
    parse_device,
    parse_name,
    parse_range,
    parse_size,
)
from lamina.config.write import write_cluster

__all__ = [
    "Attention",
    "ClusterConfig",
    "ComputeNodeConfig",
    "Dtype",
    "MemoryNodeConfig",
    "ModelConfig",
    "NodeConfig",
    "PipelineConfig",
    "RdmaConfig",
    "RecoveryConfig",
    "TransportConfig",
    "TransportKind",
    "format_cpus",
    "format_range",
    "format_size",
    "load",
    "parse_cpus",
    "parse_device",
    "parse_name",
    "parse_range",
    "parse_size",
    "read_private",
    "read_secret",
    "write_cluster",
    "write_secret",
]
