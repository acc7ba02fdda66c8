"""The file that wires a cluster, as types; ``load`` reads and checks it.

After loading, nothing reads the file or the environment again. Every message names the file, the place in it, what
was expected and what was found.
"""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from lamina.errors import ConfigError
from lamina.transport import Address
from lamina.transport.options import (
    DEFAULT_PEER_TIMEOUT,
    MAX_PEER_TIMEOUT,
    MAX_SECRET_BYTES,
    MIN_PEER_TIMEOUT,
    MIN_SECRET_BYTES,
    Options,
    RdmaOptions,
    TlsFiles,
)
from lamina.validation import explain

Attention = Literal["auto", "native", "torch"]
TransportKind = Literal["auto", "rdma", "shm", "tcp"]
Positive = Annotated[int, Meta(ge=1)]
PeerTimeout = Annotated[float, Meta(ge=MIN_PEER_TIMEOUT, le=MAX_PEER_TIMEOUT)]
StartTimeout = Annotated[float, Meta(gt=0, le=86400)]

MAX_COMPUTE = 32
"""Compute nodes of a cluster, as in the protocol."""
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
    compile: bool = True
    """Compile the slices where they run on a CPU: the first start takes longer, and keeps the result for the others."""


class PipelineConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[pipeline]``: batches and their limits."""

    batches: Annotated[int, Meta(ge=1, le=32)] = 1
    """Batches in flight."""
    max_batch: Annotated[int, Meta(ge=1, le=4096)] = 64
    """The most sequences of one batch."""
    prefill_tokens: Annotated[int, Meta(ge=1, le=65536)] = 512
    """The most prompt tokens that go through the slices together with one step of a batch."""
    prefill_kv: str = "1GiB"
    """Keys and values of prompts that the compute node keeps while it prefills them, so that their chunks attend there.
    What goes beyond attends on the memory nodes, more slowly."""
    max_waiting: Positive = 1024
    """Requests that may wait for admission; one more is refused."""
    partition: Literal["heads", "requests", "tokens"] = "heads"
    """How the KV cache lies on the memory nodes: each has some KV heads of everything, or whole sequences, or stretches
    of tokens of every long sequence."""

    @property
    def prefill_kv_bytes(self) -> int:
        return parse_size(self.prefill_kv)


class RdmaConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[transport.rdma]``: which port to use and how. None: the first that is active."""

    device: str | None = None
    """Such as "mlx5_0"; a node's ``rdma_device`` says otherwise for that node."""
    port: Annotated[int, Meta(ge=1, le=255)] | None = None
    gid_index: Annotated[int, Meta(ge=0, le=65535)] | None = None
    """None: that of RoCE v2 with an IPv4 address, where there is one."""
    mtu: int | None = None
    """Bytes. None: the smaller of both ports' active MTU."""
    queue: int = RdmaOptions().queue
    """Writes that may be under way on a lane."""


class TransportConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[transport]``: how nodes reach each other. Files are relative to the cluster file."""

    kind: TransportKind = "auto"
    """"auto" takes shm on one host, else rdma, else tcp; anything else is an error where it cannot be had."""
    secret_file: str | None = None
    """What all nodes and clients know and nobody else does; ``lamina secret`` makes one. Needed off this machine."""
    tls_certificate: str | None = None
    """With ``tls_key`` and ``tls_authority``, in PEM: encrypt control connections, and lanes over tcp."""
    tls_key: str | None = None
    tls_authority: str | None = None
    """Whoever signed the certificates of all nodes and clients."""
    busy_poll: bool = False
    """Look for arrivals all the time instead of sleeping: faster answers, for a whole processor of every node."""
    peer_timeout: PeerTimeout = DEFAULT_PEER_TIMEOUT
    """A peer that is silent for longer, in seconds, is dead."""
    start_timeout: StartTimeout = 60.0
    """How long, in seconds, a node waits at its start for the others."""
    rdma: RdmaConfig = RdmaConfig()

    def options(self, folder: Path, place: Callable[[str], str] = "transport.{}".format) -> Options:
        """What links want to know, with the secret read. ConfigError begins with the ``place`` of the wrong key."""

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


class NodeConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[[node]]``: one node."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    role: Literal["compute", "memory"]
    address: str
    device: str | None = None
    """Compute nodes: "cpu" (default) or "cuda:N"."""
    layers: str | None = None
    """Compute nodes: which layers it runs, such as "0-15". None: all of them, as its replicas do."""
    memory: str | None = None
    """Memory nodes: how much KV cache, such as "16GiB"."""
    quota: str | None = None
    """Memory nodes: how much of it this cluster takes, where others share the node. None: all that nobody else has."""
    cpus: str | None = None
    """The processors that the node is pinned to, such as "0-3,8"."""
    numa: Annotated[int, Meta(ge=0, le=4095)] | None = None
    """Memory nodes: the NUMA node that the KV cache lies on. None: that of ``cpus``, if they have one in common."""
    attention: Attention | None = None
    """Memory nodes: what computes attention. "auto" (default): the fastest that is there; "torch" is the reference."""
    threads: Annotated[int, Meta(ge=1, le=1024)] | None = None
    """Threads that compute. None: one for each of ``cpus``, else as many as torch takes; under ``lamina up``, where all
    nodes share a machine, an equal share of its cores."""
    rdma_device: str | None = None
    """The RDMA device of this node's machine. None: that of ``[transport.rdma]``."""

    @property
    def listen(self) -> Address:
        return Address.parse(self.address)

    @property
    def pinned(self) -> frozenset[int] | None:
        return parse_cpus(self.cpus) if self.cpus else None

    @property
    def layer_range(self) -> range | None:
        return parse_range(self.layers) if self.layers else None

    @property
    def memory_bytes(self) -> int:
        assert self.memory is not None, "checked when the file was loaded"
        return parse_size(self.memory)

    @property
    def quota_bytes(self) -> int | None:
        return parse_size(self.quota) if self.quota else None

    def options(self, links: Options) -> Options:
        """``links``, those of the whole cluster, as this node makes them."""
        if self.rdma_device is None:
            return links
        return dataclasses.replace(links, rdma=dataclasses.replace(links.rdma, device=self.rdma_device))


class ClusterConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file. ``file`` is where it was read from, ``links`` what ``[transport]`` and the files it names say."""

    model: ModelConfig
    node: list[NodeConfig]
    pipeline: PipelineConfig = PipelineConfig()
    transport: TransportConfig = TransportConfig()
    file: Path = Path()
    links: Options = Options()

    def options(self, node: NodeConfig | None = None) -> Options:
        """How links of ``node`` are made; without a node, those of clients and monitors, which only carry messages."""
        return node.options(self.links) if node else dataclasses.replace(self.links, kind="control")

    @property
    def front(self) -> NodeConfig:
        """The compute node that clients talk to."""
        return self.compute_nodes[0]

    @property
    def compute_nodes(self) -> list[NodeConfig]:
        return [n for n in self.node if n.role == "compute"]

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
    for key in ("file", "links"):
        if key in raw:
            raise ConfigError(f"{path}: unknown key {key!r}")
    try:
        config = msgspec.convert(raw, ClusterConfig)
    except msgspec.ValidationError as e:
        raise ConfigError(f"{path}: {explain(e, raw, ClusterConfig)}") from e
    try:
        links = config.transport.options(path.parent)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e
    config = msgspec.structs.replace(config, file=path, links=links)
    _check(config)
    return config


def _check(config: ClusterConfig) -> None:
    def fail(place: str, message: str) -> None:
        raise ConfigError(f"{config.file}: {place}: {message}")

    try:
        parse_size(config.pipeline.prefill_kv)
    except ConfigError as e:
        fail("pipeline.prefill_kv", str(e))
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
        if _is_unspecified(listen):
            fail(f"{at}.address", f"expected an address that other nodes can reach, got {node.address!r}")
        if not listen.is_loopback and config.links.secret is None:
            fail(
                f"{at}.address",
                f"{node.address!r} is not a loopback address, which needs a cluster secret: make one with "
                '`lamina secret cluster.key` and set transport.secret_file = "cluster.key"',
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
            for key, size in (("memory", node.memory), ("quota", node.quota)):
                try:
                    nbytes = None if size is None else parse_size(size)
                except ConfigError as e:
                    fail(f"{at}.{key}", str(e))
                if key == "quota" and nbytes is not None and nbytes > node.memory_bytes:
                    fail(f"{at}.quota", f"expected no more than the node's memory, {node.memory}, got {node.quota!r}")
            for key, value in (("device", node.device), ("layers", node.layers)):
                if value is not None:
                    fail(f"{at}.{key}", f"expected no {key} on a memory node, got {value!r}")
            continue
        for key, given in (
            ("memory", node.memory),
            ("quota", node.quota),
            ("numa", node.numa),
            ("attention", node.attention),
        ):
            if given is not None:
                fail(f"{at}.{key}", f"expected no {key} on a compute node, got {given!r}")
        if node.device is not None and not re.fullmatch(r"cpu|cuda:\d{1,3}", node.device):
            fail(f"{at}.device", f'expected "cpu" or "cuda:N", got {node.device!r}')
    compute = config.compute_nodes
    if not 1 <= len(compute) <= MAX_COMPUTE:
        fail("node", f"expected 1 to {MAX_COMPUTE} compute nodes, got {len(compute)}")
    if any(n.layers is not None for n in compute):
        _check_layers(config, fail)
    if not config.memory_nodes:
        fail("node", "expected at least one memory node, got none")


def _check_layers(config: ClusterConfig, fail: Callable[[str, str], None]) -> None:
    """Every compute node has some, and they follow each other. How many there are, the model will say."""
    expected = 0
    for i, node in enumerate(config.node):
        if node.role != "compute":
            continue
        at = f"node[{i}].layers"
        if node.layers is None:
            fail(at, "missing; where one compute node has layers, all must have some")
            return
        try:
            own = parse_range(node.layers)
        except ConfigError as e:
            fail(at, str(e))
            return
        if own.start != expected:
            fail(at, f"expected layers from {expected} on, after those of the compute node before, got {node.layers!r}")
        expected = own.stop


def _is_unspecified(address: Address) -> bool:
    """Whether it means every address of the machine, which is somewhere to listen and nowhere to call."""
    try:
        return ip_address(address.host).is_unspecified
    except ValueError:
        return False


def read_secret(path: Path) -> bytes:
    """The cluster secret in a file that only its owner may read; one newline at its end does not count."""
    try:
        # A pipe would keep us waiting for whoever writes it.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise ConfigError(f"{path} is not a regular file")
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise ConfigError(
                    f"{path} is open to others (mode {stat.S_IMODE(mode):04o}); let its owner alone read it: "
                    f"chmod 600 {path}"
                )
            secret = file.read(MAX_SECRET_BYTES + 2)
    except OSError as e:
        hint = f"; `lamina secret {path}` makes a new one" if isinstance(e, FileNotFoundError) else ""
        raise ConfigError(f"{path} cannot be read: {e.strerror}{hint}") from e
    except ValueError as e:  # a name that no file can have
        raise ConfigError(f"{str(path)!r} cannot be read: {e}") from e
    secret = secret.removesuffix(b"\n")
    if not MIN_SECRET_BYTES <= len(secret) <= MAX_SECRET_BYTES:
        size = f"{len(secret)} bytes" if len(secret) <= MAX_SECRET_BYTES else "more"
        raise ConfigError(f"{path}: expected a secret of {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes, got {size}")
    return secret


def write_secret(path: Path) -> None:
    """Make a file with a new random secret that only its owner may read. ConfigError if there is one already."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as e:
        raise ConfigError(
            f"{path} exists already and is not overwritten: nodes that know the old secret need it"
        ) from e
    except OSError as e:
        raise ConfigError(f"{path} cannot be written: {e.strerror}") from e
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32) + "\n")


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


def parse_range(text: str) -> range:
    """Numbers such as "0-15" or "3", both ends included; none is above 99999."""
    match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", text.strip())
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise ConfigError(f'expected layers like "0-15", got {text!r:.200}')
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def parse_cpus(text: str) -> frozenset[int]:
    """Processor numbers of a list such as "0-3,8"; none is above 99999."""
    cpus: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(f'expected processor numbers like "0-3,8", got {text!r:.200}')
        cpus.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(cpus)
