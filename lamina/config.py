"""The file that wires a cluster, as types; ``load`` reads and checks it.

After loading, nothing reads the file or the environment again. Every message names the file, the place in it, what
was expected and what was found.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from lamina.errors import ConfigError
from lamina.transport import Address
from lamina.transport.handshake import MAX_PEER_TIMEOUT, MIN_PEER_TIMEOUT
from lamina.validation import explain

Attention = Literal["auto", "native", "torch"]
Positive = Annotated[int, Meta(ge=1)]
PeerTimeout = Annotated[float, Meta(ge=MIN_PEER_TIMEOUT, le=MAX_PEER_TIMEOUT)]
StartTimeout = Annotated[float, Meta(gt=0, le=86400)]

MAX_SIZE = 2**60
"""Bytes; what a size may say at most, far beyond what a machine has."""


class ModelConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[model]``: the checkpoint directory, relative to the file, and how it runs."""

    path: str
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """None: as stored in the checkpoint."""
    kv_dtype: Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"] | None = None
    """The type in which memory nodes store keys and values. None: that in which the model runs."""
    context: Positive | None = None
    """The most tokens of one request, prompt and answer together. None: what the model was made for."""


class PipelineConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[pipeline]``: batches and their limits."""

    batches: Annotated[int, Meta(ge=1, le=32)] = 1
    """Batches in flight."""
    max_batch: Annotated[int, Meta(ge=1, le=4096)] = 64
    """The most sequences of one batch."""
    prefill_tokens: Annotated[int, Meta(ge=1, le=65536)] = 512
    """The most prompt tokens that go through the slices together with one step of a batch."""
    max_waiting: Positive = 1024
    """Requests that may wait for admission; one more is refused."""
    partition: Literal["heads"] = "heads"
    """How the KV cache lies on the memory nodes."""


class TransportConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[transport]``: how nodes reach each other."""

    kind: Literal["auto", "tcp"] = "auto"
    peer_timeout: PeerTimeout = 2.0
    """A peer that is silent for longer, in seconds, is dead."""
    start_timeout: StartTimeout = 60.0
    """How long, in seconds, a node waits at its start for the others."""


class NodeConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[[node]]``: one node."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    role: Literal["compute", "memory"]
    address: str
    device: str | None = None
    """Compute nodes: "cpu" (default) or "cuda:N"."""
    memory: str | None = None
    """Memory nodes: how much KV cache, such as "16GiB"."""
    cpus: str | None = None
    """The processors that the node is pinned to, such as "0-3,8"."""
    numa: Annotated[int, Meta(ge=0, le=4095)] | None = None
    """Memory nodes: the NUMA node that the KV cache lies on. None: that of ``cpus``, if they have one in common."""
    attention: Attention | None = None
    """Memory nodes: what computes attention. "auto" (default): the fastest that is there; "torch" is the reference."""
    threads: Annotated[int, Meta(ge=1, le=1024)] | None = None
    """Threads that compute. None: one for each of ``cpus``, else as many as torch takes; under ``lamina up``, where all
    nodes share a machine, an equal share of its cores."""

    @property
    def listen(self) -> Address:
        return Address.parse(self.address)

    @property
    def pinned(self) -> frozenset[int] | None:
        return parse_cpus(self.cpus) if self.cpus else None

    @property
    def memory_bytes(self) -> int:
        assert self.memory is not None, "checked when the file was loaded"
        return parse_size(self.memory)


class ClusterConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file. ``file`` is where it was read from."""

    model: ModelConfig
    node: list[NodeConfig]
    pipeline: PipelineConfig = PipelineConfig()
    transport: TransportConfig = TransportConfig()
    file: Path = Path()

    @property
    def front(self) -> NodeConfig:
        """The compute node that clients talk to."""
        return next(n for n in self.node if n.role == "compute")

    @property
    def memory_nodes(self) -> list[NodeConfig]:
        return [n for n in self.node if n.role == "memory"]

    @property
    def model_path(self) -> Path:
        return self.file.parent / self.model.path

    def find(self, name: str) -> NodeConfig:
        """The node called ``name``; ConfigError lists the known ones."""
        for node in self.node:
            if node.name == name:
                return node
        raise ConfigError(f"{self.file}: no node called {name!r}; known: {', '.join(n.name for n in self.node)}")


def load(path: str | Path) -> ClusterConfig:
    """Read and check a cluster file; ConfigError says what is wrong and where."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: not a text file in UTF-8") from e
    except (ValueError, RecursionError) as e:  # also of numbers and nesting too long for the parser
        raise ConfigError(f"{path}: not valid TOML: {e}") from e
    if "file" in raw:
        raise ConfigError(f"{path}: unknown key 'file'")
    try:
        config = msgspec.convert(raw, ClusterConfig)
    except msgspec.ValidationError as e:
        raise ConfigError(f"{path}: {explain(e, raw, ClusterConfig)}") from e
    config = msgspec.structs.replace(config, file=path)
    _check(config)
    return config


def _check(config: ClusterConfig) -> None:
    def fail(place: str, message: str) -> None:
        raise ConfigError(f"{config.file}: {place}: {message}")

    names: set[str] = set()
    addresses: dict[str, str] = {}
    for i, node in enumerate(config.node):
        at = f"node[{i}]"
        if node.name in names:
            fail(f"{at}.name", f"{node.name!r} is used twice; names must differ")
        names.add(node.name)
        try:
            listen = node.listen
        except ConfigError as e:
            fail(f"{at}.address", str(e))
        if not listen.is_loopback:
            fail(
                f"{at}.address",
                f"{node.address!r} is not a loopback address; until nodes can authenticate each "
                "other by a cluster secret, only 127.0.0.0/8, ::1 and localhost are allowed",
            )
        if listen.port == 0:
            fail(f"{at}.address", f"expected a port from 1 to 65535, got {node.address!r}")
        if str(listen) in addresses:
            fail(f"{at}.address", f"{node.address!r} is already the address of {addresses[str(listen)]!r}")
        addresses[str(listen)] = node.name
        if node.cpus is not None:
            try:
                parse_cpus(node.cpus)
            except ConfigError as e:
                fail(f"{at}.cpus", str(e))
        if node.role == "memory":
            if node.memory is None:
                fail(f"{at}.memory", 'missing; expected a size like "16GiB"')
            else:
                try:
                    parse_size(node.memory)
                except ConfigError as e:
                    fail(f"{at}.memory", str(e))
            if node.device is not None:
                fail(f"{at}.device", f"expected no device on a memory node, got {node.device!r}")
            continue
        for key, value in (("memory", node.memory), ("numa", node.numa), ("attention", node.attention)):
            if value is not None:
                fail(f"{at}.{key}", f"expected no {key} on a compute node, got {value!r}")
        if node.device is not None and not re.fullmatch(r"cpu|cuda:\d{1,3}", node.device):
            fail(f"{at}.device", f'expected "cpu" or "cuda:N", got {node.device!r}')
    compute = [i for i, n in enumerate(config.node) if n.role == "compute"]
    if len(compute) != 1:
        fail(
            f"node[{compute[1]}].role" if compute else "node",
            f"expected exactly one compute node, got {len(compute)}; several are not supported yet",
        )
    if not config.memory_nodes:
        fail("node", "expected at least one memory node, got none")


_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_size(text: str) -> int:
    """Bytes of a size such as "512MiB" or "1.5GiB", at most MAX_SIZE."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB|TiB)", text.strip())
    nbytes = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if nbytes < 1:
        raise ConfigError(f'expected a size like "16GiB", got {text!r:.200}')
    if nbytes > MAX_SIZE:
        raise ConfigError(f"expected a size of at most {MAX_SIZE // 2**40}TiB, got {text!r:.200}")
    return int(nbytes)


def parse_cpus(text: str) -> frozenset[int]:
    """Processor numbers of a list such as "0-3,8"; none is above 99999."""
    cpus: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(f'expected processor numbers like "0-3,8", got {text!r:.200}')
        cpus.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(cpus)
