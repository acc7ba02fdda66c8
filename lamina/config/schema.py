"""The cluster file as types: one struct for each table, and one for each role of a node.

Sizes, processors, layers and addresses are values here, not text. The structs can be made in Python as well;
``write_cluster`` makes a file of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta, Struct

from lamina.config.secret import read_secret
from lamina.config.texts import Cpus, DeviceName, Folder, Layers, ListenAddress, NodeName, Size
from lamina.errors import ConfigError
from lamina.limits import MAX_BATCH, MAX_BATCHES, MAX_LEASE, MAX_PREFILL_TOKENS
from lamina.transport import Address
from lamina.transport.options import (
    DEFAULT_PEER_TIMEOUT,
    MAX_PEER_TIMEOUT,
    MIN_PEER_TIMEOUT,
    Options,
    RdmaOptions,
    TlsFiles,
)

Attention = Literal["auto", "native", "torch"]
Dtype = Literal["float32", "bfloat16", "float16"]
TransportKind = Literal["auto", "rdma", "shm", "tcp"]
Positive = Annotated[int, Meta(ge=1)]
PeerTimeout = Annotated[float, Meta(ge=MIN_PEER_TIMEOUT, le=MAX_PEER_TIMEOUT)]
StartTimeout = Annotated[float, Meta(gt=0, le=86400)]
Patience = Annotated[float, Meta(ge=0, le=MAX_LEASE)]


class ModelConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[model]``: the checkpoint directory, relative to the file, and how it runs."""

    path: str
    """A Hugging Face directory: configuration, safetensors and tokenizer."""
    dtype: Dtype | None = None
    """The type in which the model runs. None: the one of the checkpoint."""
    kv_dtype: Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"] | None = None
    """The type in which memory nodes store keys and values. None: the type in which the model runs."""
    context: Positive | None = None
    """The most tokens of one request, prompt and answer together. None: the context of the model."""
    compile: bool = True
    """Compile the slices that run on a CPU. The first start takes longer; its result is kept for later starts."""


class PipelineConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[pipeline]``: batches and their limits."""

    batches: Annotated[int, Meta(ge=1, le=MAX_BATCHES)] = 1
    """Batches in flight."""
    max_batch: Annotated[int, Meta(ge=1, le=MAX_BATCH)] = 64
    """The most sequences of one batch."""
    prefill_tokens: Annotated[int, Meta(ge=1, le=MAX_PREFILL_TOKENS)] = 512
    """The most prompt tokens that go through the slices together with one step of a batch."""
    prefill_kv: Size = 2**30
    """How much of the keys and values of unfinished prompts the compute node keeps. Chunks within it attend there; the
    others attend on the memory nodes, more slowly."""
    max_waiting: Positive = 1024
    """Requests that may wait for admission. The next one is refused."""
    partition: Literal["heads", "requests", "tokens"] = "heads"
    """What each memory node holds: some KV heads of all sequences, whole sequences, or stripes of the tokens of every
    long sequence."""
    moves: bool = True
    """Let sequences lie on several memory nodes in parts, and move parts from full nodes to others. Not possible where
    heads are divided, nor for a model with sliding windows."""


class RdmaConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[transport.rdma]``: the port to use, and its settings."""

    device: str | None = None
    """Such as "mlx5_0". None: the first device with an active port. ``rdma_device`` of a node takes precedence."""
    port: Annotated[int, Meta(ge=1, le=255)] | None = None
    """None: the first active port."""
    gid_index: Annotated[int, Meta(ge=0, le=65535)] | None = None
    """None: the GID of RoCE v2 with an IPv4 address, if there is one."""
    mtu: int | None = None
    """In bytes. None: the smaller active MTU of the two ports."""
    queue: int = RdmaOptions().queue
    """Writes in flight on one lane."""


class TransportConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[transport]``: how nodes reach each other. Files are relative to the cluster file."""

    kind: TransportKind = "auto"
    """"auto" takes shm on one host, else rdma, else tcp. The other kinds are an error where they cannot be had."""
    secret_file: str | None = None
    """The secret that all nodes and clients share; ``lamina secret`` makes one. Addresses off this machine need it."""
    tls_certificate: str | None = None
    """With ``tls_key`` and ``tls_authority``, in PEM: encrypts control connections, and the lanes of tcp."""
    tls_key: str | None = None
    """The private key of the certificate."""
    tls_authority: str | None = None
    """The authority that signed the certificates of all nodes and clients."""
    busy_poll: bool = False
    """Poll for arrivals instead of sleeping. Answers come sooner, and every node keeps one processor busy."""
    peer_timeout: PeerTimeout = DEFAULT_PEER_TIMEOUT
    """Seconds of silence after which a peer counts as dead. Setting up a link may take as long, or 4 s."""
    start_timeout: StartTimeout = 60.0
    """Seconds that a starting node waits for the others."""
    rdma: RdmaConfig = RdmaConfig()
    """The table ``[transport.rdma]``."""

    def options(self, folder: Path, place: Callable[[str], str] = "transport.{}".format) -> Options:
        """The options of links, with the secret read. A ConfigError begins with the ``place`` of the wrong key."""

        def at(key: str, error: ConfigError) -> ConfigError:
            return ConfigError(f"{place(key)}: {error}")

        secret = None
        if self.secret_file is not None:
            try:
                secret = read_secret(folder / self.secret_file)
            except ConfigError as e:
                raise at("secret_file", e) from e
        tls = None
        files = {key: getattr(self, key) for key in ("tls_certificate", "tls_key", "tls_authority")}
        given = [file for file in files.values() if file is not None]
        if len(given) == len(files):
            tls = TlsFiles(*(folder / file for file in given))
            try:
                tls.context(connecting=True)
            except ConfigError as e:
                raise at("tls_certificate", e) from e
        elif given:
            missing = next(key for key, file in files.items() if file is None)
            raise at(missing, ConfigError("missing; certificate, key and authority are needed together"))
        try:
            rdma = RdmaOptions(**msgspec.structs.asdict(self.rdma))
        except ConfigError as e:
            raise ConfigError(f"{place('rdma')}: {str(e).removeprefix('rdma: ')}") from e
        return Options(
            kind=self.kind,
            peer_timeout=self.peer_timeout,
            secret=secret,
            tls=tls,
            busy_poll=self.busy_poll,
            rdma=rdma,
        )


class RecoveryConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[recovery]``: what is kept when a node is lost, and for how long."""

    grace: Patience = 10.0
    """Seconds that a lost node may take to come back before the cluster goes on without it for good, and before another
    compute node takes the part of a lost front."""
    lease: Patience = 60.0
    """Seconds that memory nodes keep this cluster's cache, and the front its finished answers, for one that comes back.
    0: the cache ends with the front."""
    journal: Literal["off", "process", "machine"] = "process"
    """What the front's record of requests and tokens outlives: nothing, as there is none; the front's process; or the
    machine, which waits for the disk in every step."""
    journal_dir: Folder | None = None
    """Where the record is, relative to the file. None: a folder of this cluster's own in $XDG_STATE_HOME/lamina, or in
    ~/.local/state/lamina."""


class LogConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[log]``: how nodes write their logs. ``--log-format`` and LAMINA_LOG_FORMAT take precedence."""

    format: Literal["logfmt", "json"] = "logfmt"
    """One line per event: ``key=value`` pairs, or a JSON object."""


class _Node(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="role"):
    """The keys that nodes of both roles have."""

    name: NodeName
    """Names the node in messages, logs and commands."""
    address: ListenAddress
    """Where other nodes and clients reach the node."""
    listen: ListenAddress | None = None
    """Where the node itself listens, if that differs, as behind a name that is 127.0.1.1 on its own machine."""
    cpus: Cpus | None = None
    """The processors that the node is pinned to, such as "0-3,8"."""
    threads: Annotated[int, Meta(ge=1, le=1024)] | None = None
    """Threads that compute. None: one for each of ``cpus``, else as many as torch takes. Under ``lamina up``, where all
    nodes share a machine, None is an equal share of its cores."""
    rdma_device: str | None = None
    """The RDMA device of this node's machine. None: the device of ``[transport.rdma]``."""
    metrics: ListenAddress | None = None
    """Where the node answers Prometheus over HTTP, such as "127.0.0.1:9101". Off this machine everybody may read it.
    None: nowhere."""

    @property
    def bind(self) -> Address:
        """Where the node itself listens."""
        return self.listen or self.address

    def options(self, links: Options) -> Options:
        """``links``, the options of the whole cluster, with this node's RDMA device."""
        if self.rdma_device is None:
            return links
        return dataclasses.replace(links, rdma=dataclasses.replace(links.rdma, device=self.rdma_device))


class ComputeNodeConfig(_Node, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="compute"):
    """A ``[[node]]`` with ``role = "compute"``."""

    role: ClassVar[Literal["compute"]] = "compute"
    device: DeviceName = "cpu"
    """"cpu" or "cuda:N"."""
    layers: Layers | None = None
    """The layers that the node runs, such as "0-15". None: all of them, as a replica."""


class MemoryNodeConfig(_Node, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="memory"):
    """A ``[[node]]`` with ``role = "memory"``."""

    role: ClassVar[Literal["memory"]] = "memory"
    memory: Size
    """The size of the KV cache, such as "16GiB"."""
    quota: Size | None = None
    """How much of ``memory`` this cluster takes, where several share the node. None: all that is free."""
    numa: Annotated[int, Meta(ge=0, le=4095)] | None = None
    """The NUMA node that the KV cache lies on. None: the one of ``cpus``, if they have one in common."""
    attention: Attention = "auto"
    """The backend that computes attention. "auto" is the fastest that this machine has; "torch" is the reference."""


NodeConfig = ComputeNodeConfig | MemoryNodeConfig


class ClusterConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file. ``file`` is its path; ``links`` holds what ``[transport]`` and the files named there say."""

    model: ModelConfig
    node: list[NodeConfig]
    pipeline: PipelineConfig = PipelineConfig()
    transport: TransportConfig = TransportConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    log: LogConfig = LogConfig()
    file: Path = Path()
    links: Options = Options()

    def options(self, node: NodeConfig | None = None) -> Options:
        """How ``node`` makes links. Without a node: how clients and monitors do, which only send messages."""
        return node.options(self.links) if node else dataclasses.replace(self.links, kind="control")

    @property
    def front(self) -> ComputeNodeConfig:
        """The compute node that is the front when the cluster starts: the first one of the file."""
        return self.compute_nodes[0]

    @property
    def compute_nodes(self) -> list[ComputeNodeConfig]:
        return [n for n in self.node if isinstance(n, ComputeNodeConfig)]

    @property
    def memory_nodes(self) -> list[MemoryNodeConfig]:
        return [n for n in self.node if isinstance(n, MemoryNodeConfig)]

    @property
    def model_path(self) -> Path:
        return self.file.parent / self.model.path

    def find(self, name: str) -> NodeConfig:
        """The node called ``name``; ConfigError lists the known ones."""
        for node in self.node:
            if node.name == name:
                return node
        raise ConfigError(f"{self.file}: no node called {name!r}; known: {', '.join(n.name for n in self.node)}")
