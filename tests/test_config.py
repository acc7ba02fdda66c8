"""A cluster file is read as it is meant, or refused with a sentence that says where and why."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.config import (
    ComputeNodeConfig,
    MemoryNodeConfig,
    ModelConfig,
    NodeConfig,
    PipelineConfig,
    RdmaConfig,
    RecoveryConfig,
    TransportConfig,
    format_cpus,
    format_range,
    format_size,
    load,
    parse_cpus,
    parse_range,
    parse_size,
    read_secret,
    write_cluster,
    write_secret,
)
from lamina.errors import ConfigError
from lamina.transport import Address, Options, RdmaOptions

GOOD = """\
[model]
path = "models/tiny"

[pipeline]
max_batch = 8

[[node]]
name = "c0"
role = "compute"
address = "tcp://127.0.0.1:7070"

[[node]]
name = "m0"
role = "memory"
address = "127.0.0.1:7071"
memory = "1.5GiB"
quota = "512MiB"
cpus = "0-1"
numa = 1
attention = "torch"
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "cluster.toml"
    file.write_text(text)
    return file


def test_a_good_file_is_read(tmp_path: Path) -> None:
    """Values, defaults and paths relative to the file."""
    config = load(write(tmp_path, GOOD))

    assert config.front.name == "c0"
    assert config.model_path == tmp_path / "models/tiny"
    assert config.pipeline.max_batch == 8
    assert config.transport.peer_timeout == 2.0
    (memory,) = config.memory_nodes
    assert (memory.memory, memory.quota) == (3 * 2**29, 2**29)
    assert memory.cpus == {0, 1}
    assert (memory.numa, memory.attention) == (1, "torch")
    assert config.model.kv_dtype is None
    assert memory.address == Address("tcp", "127.0.0.1", 7071)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('memory = "1.5GiB"', 'memory = "lots"', "node[1].memory: expected a size like \"16GiB\", got 'lots'"),
        ('memory = "1.5GiB"', "memory = 16", 'node[1].memory: expected a size like "16GiB", got 16'),
        ('memory = "1.5GiB"', "", 'node[1].memory: missing; expected a size like "16GiB"'),
        ('memory = "1.5GiB"', 'memory = "0GiB"', "node[1].memory: expected a size like \"16GiB\", got '0GiB'"),
        ('quota = "512MiB"', 'quota = "half"', "node[1].quota: expected a size like \"16GiB\", got 'half'"),
        (
            'quota = "512MiB"',
            'quota = "2GiB"',
            "node[1].quota: expected no more than the node's memory, 1.5GiB, got 2GiB",
        ),
        (
            'role = "compute"',
            'role = "compute"\nquota = "1GiB"',
            "node[0].quota: expected no quota on a compute node, got '1GiB'",
        ),
        ('cpus = "0-1"', 'cpus = "3-1"', "node[1].cpus: expected processor numbers like \"0-3,8\", got '3-1'"),
        ('memory = "1.5GiB"', f'memory = "1{"0" * 400}GiB"', "node[1].memory: expected a size of at most 1048576TiB"),
        ('memory = "1.5GiB"', 'memory = "1048577TiB"', "at most 1048576TiB, got '1048577TiB'"),
        ('cpus = "0-1"', f'cpus = "0-{"9" * 5000}"', "node[1].cpus: expected processor numbers"),
        ('cpus = "0-1"', 'gpus = "0"', "node[1]: unknown key 'gpus'"),
        ('cpus = "0-1"', '"my cpus" = "0"', "node[1]: unknown key 'my cpus'"),
        ("max_batch = 8", "max_batch = 0", "pipeline.max_batch: expected int >= 1, got 0"),
        ("max_batch = 8", 'max_batch = "8"', "pipeline.max_batch: expected int, got '8'"),
        ("max_batch = 8", f"max_batch = {'8' * 5000}", "not valid TOML"),
        ("max_batch = 8", f"max_batch = {'[' * 5000}", "not valid TOML"),
        (
            "max_batch = 8",
            'partition = "layers"',
            "pipeline.partition: expected one of heads, requests, tokens; got 'layers'",
        ),
        ("max_batch = 8", "max_bach = 8", "pipeline: unknown key 'max_bach'"),
        ('path = "models/tiny"', "", "model: missing key 'path'"),
        (
            'path = "models/tiny"',
            'path = "x"\ndtype = "int4"',
            "model.dtype: expected one of float32, bfloat16, float16; got 'int4'",
        ),
        (
            'path = "models/tiny"',
            'path = "x"\ndtype = 4',
            "model.dtype: expected one of float32, bfloat16, float16; got 4",
        ),
        (
            'path = "models/tiny"',
            'path = "x"\nkv_dtype = "int4"',
            "model.kv_dtype: expected one of float32, bfloat16, float16, float8_e4m3fn, int8; got 'int4'",
        ),
        ("numa = 1", "numa = -1", "node[1].numa: expected int >= 0, got -1"),
        ("numa = 1", 'numa = "0"', "node[1].numa: expected int, got '0'"),
        ('role = "compute"', 'role = "compute"\nnuma = 0', "node[0].numa: expected no numa on a compute node, got 0"),
        (
            'role = "compute"',
            'role = "compute"\nattention = "torch"',
            "node[0].attention: expected no attention on a compute node, got 'torch'",
        ),
        (
            'attention = "torch"',
            'attention = "fast"',
            "node[1].attention: expected one of auto, native, torch; got 'fast'",
        ),
        ('role = "memory"', 'role = "gpu"', "node[1].role: expected one of compute, memory; got 'gpu'"),
        ('role = "memory"', "role = [1]", "node[1].role: expected one of compute, memory; got [1]"),
        ('role = "memory"', "", "node[1]: missing key 'role'; expected one of compute, memory"),
        ('address = "127.0.0.1:7071"', "", 'node[1].address: missing; expected an address like "tcp://10.0.0.1:7070"'),
        ('role = "compute"', 'role = "compute"\nlayers = 3', 'node[0].layers: expected layers like "0-15", got 3'),
        ("max_batch = 8", 'prefill_kv = "all"', "pipeline.prefill_kv: expected a size like \"16GiB\", got 'all'"),
        ("max_batch = 8", "prefill_kv = true", 'pipeline.prefill_kv: expected a size like "16GiB", got True'),
        ("[model]", "[pipelines]\n[model]", "unknown key 'pipelines'"),
        ("[[node]]", "[[nodes]]", "unknown key 'nodes'"),
        ('name = "m0"', 'name = "c0"', "node[1].name: 'c0' is used twice"),
        ('name = "m0"', 'name = "m 0"', 'node[1].name: expected a name like "m0", of at most 64 letters, digits'),
        ("127.0.0.1:7071", "127.0.0.1:7070", "node[1].address: tcp://127.0.0.1:7070 is already the address of 'c0'"),
        ("127.0.0.1:7071", "localhost:7070", "node[1].address: tcp://localhost:7070 is already the address of 'c0'"),
        ("127.0.0.1:7071", "LOCALHOST:7070", "node[1].address: tcp://LOCALHOST:7070 is already the address of 'c0'"),
        (
            "numa = 1",
            'numa = 1\nlisten = "0.0.0.0:7071"',
            "node[1].listen: tcp://0.0.0.0:7071 is not a loopback address",
        ),
        ("numa = 1", 'numa = 1\nlisten = "127.0.0.1:0"', "node[1].listen: expected a port from 1 to 65535"),
        ("numa = 1", 'numa = 1\nlisten = "x"', "node[1].listen: 'x': the port is missing"),
        ("numa = 1", "numa = 1\nrdma_device = 8", "node[1].rdma_device: expected str, got 8"),
        ("max_batch = 8", "max_bach = 8", "pipeline: unknown key 'max_bach'; did you mean 'max_batch'?"),
        ('cpus = "0-1"', 'cpu = "0-1"', "node[1]: unknown key 'cpu'; did you mean 'cpus'?"),
        ('cpus = "0-1"', 'memry = "0-1"', "node[1]: unknown key 'memry'; did you mean 'memory'?"),
        ('memory = "1.5GiB"', 'memroy = "1.5GiB"', "node[1]: unknown key 'memroy'; did you mean 'memory'?"),
        ('role = "memory"', 'rol = "memory"', "node[1]: unknown key 'rol'; did you mean 'role'?"),
        ('name = "m0"', 'nmae = "m0"', "node[1]: unknown key 'nmae'; did you mean 'name'?"),
        ('cpus = "0-1"', 'zzz = "0-1"', "node[1]: unknown key 'zzz'; known: name, address, listen, cpus, threads"),
        ("[[node]]", "[[nodes]]", "unknown key 'nodes'; did you mean 'node'?"),
        ("[pipeline]", "[pipline]", "unknown key 'pipline'; did you mean 'pipeline'?"),
        (
            "127.0.0.1:7071",
            "10.0.0.2:7071",
            "node[1].address: tcp://10.0.0.2:7071 is not a loopback address, which needs a",
        ),
        ("127.0.0.1:7071", "10.0.0.2:7071", "make one with `lamina secret cluster.key`"),
        ("127.0.0.1:7071", "0.0.0.0:7071", "node[1].address: expected an address that other nodes can reach"),
        ("127.0.0.1:7071", "127.0.0.1:99999", "node[1].address: "),
        ("127.0.0.1:7071", "tcp://127.0.0.1", "node[1].address: "),
        ('role = "memory"', 'role = "compute"', "node[1].memory: expected no memory on a compute node"),
        ('cpus = "0-1"', 'device = "cuda:0"', "node[1].device: expected no device on a memory node"),
        ('role = "compute"', 'role = "compute"\ndevice = "gpu"', 'node[0].device: expected "cpu" or "cuda:N"'),
        (
            "[pipeline]",
            '[transport]\nkind = "ib"\n[pipeline]',
            "transport.kind: expected one of auto, rdma, shm, tcp; got 'ib'",
        ),
        (
            "[pipeline]",
            '[transport]\nkind = "control"\n[pipeline]',
            "transport.kind: expected one of auto, rdma, shm, tcp",
        ),
        ("[pipeline]", '[transport]\nsecret = "x"\n[pipeline]', "transport: unknown key 'secret'"),
        ("[pipeline]", '[transport]\nsecret_file = "none.key"\n[pipeline]', "transport.secret_file: "),
        (
            "[pipeline]",
            '[transport]\nsecret_file = "a\\u0000b"\n[pipeline]',
            "cannot be read: embedded null byte",
        ),
        (
            "[pipeline]",
            '[transport]\ntls_key = "a"\ntls_authority = "b"\n[pipeline]',
            "transport.tls_certificate: missing; certificate, key and authority are needed together",
        ),
        (
            "[pipeline]",
            '[transport]\ntls_certificate = "a"\ntls_key = "b"\ntls_authority = "none.pem"\n[pipeline]',
            "none.pem cannot be used: No such file or directory",
        ),
        ("[pipeline]", '[transport]\nbusy_poll = "yes"\n[pipeline]', "transport.busy_poll: expected bool, got 'yes'"),
        ("[pipeline]", "[transport.rdma]\nmtu = 1500\n[pipeline]", "transport.rdma: mtu must be one of 256, 512, 1024"),
        ("[pipeline]", "[transport.rdma]\nqueue = 1\n[pipeline]", "transport.rdma: queue must be 16 to 16384, got 1"),
        ("[pipeline]", "[transport.rdma]\nport = 0\n[pipeline]", "transport.rdma.port: expected int >= 1, got 0"),
        ("[pipeline]", '[transport.rdma]\nspeed = "fast"\n[pipeline]', "transport.rdma: unknown key 'speed'"),
        (
            "[pipeline]",
            "[transport]\npeer_timeout = 0.01\n[pipeline]",
            "peer_timeout: expected float >= 0.05, got 0.01",
        ),
        (
            "[pipeline]",
            "[transport]\npeer_timeout = inf\n[pipeline]",
            "peer_timeout: expected float <= 3600.0, got inf",
        ),
        ("[pipeline]", "[transport]\npeer_timeout = nan\n[pipeline]", "peer_timeout: expected float >= 0.05, got nan"),
        ("[pipeline]", "[transport]\nstart_timeout = 0\n[pipeline]", "start_timeout: expected float > 0.0, got 0"),
        (
            "[pipeline]",
            "[transport]\nstart_timeout = inf\n[pipeline]",
            "start_timeout: expected float <= 86400.0, got inf",
        ),
        ("[pipeline]", "[recovery]\nlease = -1\n[pipeline]", "recovery.lease: expected float >= 0.0, got -1"),
        (
            "[pipeline]",
            "[recovery]\ngrace = 1e9\n[pipeline]",
            "recovery.grace: expected float <= 3600.0, got 1000000000.0",
        ),
        (
            "[pipeline]",
            '[recovery]\njournal = "on"\n[pipeline]',
            "recovery.journal: expected one of off, process, machine; got 'on'",
        ),
        ("[pipeline]", "[recovery]\nleese = 1\n[pipeline]", "recovery: unknown key 'leese'; did you mean 'lease'?"),
        (
            "[pipeline]",
            '[recovery]\njournal_dir = ""\n[pipeline]',
            "recovery.journal_dir: expected a folder like \"/var/lib/lamina\", got ''",
        ),
        ("[pipeline]", "[surprise]\n[pipeline]", "unknown key 'surprise'"),
        ("[pipeline]", "[pipeline", "not valid TOML"),
        ("[model]", 'file = "x"\n[model]', "unknown key 'file'"),
        ("[model]", "links = {}\n[model]", "unknown key 'links'"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    """File, place, what was expected and what was found."""
    assert old in GOOD
    file = write(tmp_path, GOOD.replace(old, new, 1))

    with pytest.raises(ConfigError) as caught:
        load(file)

    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def compute(number: int, keys: str = "") -> str:
    """One more compute node."""
    return f'[[node]]\nname = "d{number}"\nrole = "compute"\naddress = "tcp://127.0.0.1:{7200 + number}"\n{keys}\n'


def test_several_compute_nodes_are_replicas_or_have_layers(tmp_path: Path) -> None:
    """The first of them is the front."""
    replicas = load(write(tmp_path, GOOD + compute(1) + compute(2)))
    ranges = load(
        write(
            tmp_path,
            GOOD.replace('role = "compute"', 'role = "compute"\nlayers = "0-2"') + compute(1, 'layers = "3"'),
        )
    )

    assert [n.name for n in replicas.compute_nodes] == ["c0", "d1", "d2"]
    assert replicas.front.name == "c0"
    assert [n.layers for n in replicas.compute_nodes] == [None] * 3
    assert [n.layers for n in ranges.compute_nodes] == [range(3), range(3, 4)]


@pytest.mark.parametrize(
    ("first", "more", "message"),
    [
        ("", "".join(map(compute, range(32))), "node: expected 1 to 32 compute nodes, got 33"),
        ('layers = "0-2"', compute(1), "node[2].layers: missing; where one compute node has layers, all must"),
        ('layers = "0-2"', compute(1, 'layers = "4-5"'), "node[2].layers: expected layers from 3 on"),
        ('layers = "1-2"', compute(1, 'layers = "3-5"'), "node[0].layers: expected layers from 0 on"),
        ('layers = "2-0"', compute(1, 'layers = "3-5"'), "node[0].layers: expected layers like"),
        ('layers = "all"', compute(1, 'layers = "3-5"'), "node[0].layers: expected layers like"),
    ],
)
def test_compute_nodes_that_do_not_fit_together_are_refused(
    first: str, more: str, message: str, tmp_path: Path
) -> None:
    """Too many, or layers that do not follow each other."""
    text = GOOD.replace('role = "compute"', f'role = "compute"\n{first}') + more

    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text))

    assert message in str(caught.value)


def test_a_memory_node_is_asked_for(tmp_path: Path) -> None:
    """Without one there is no place for keys and values."""
    with pytest.raises(ConfigError, match="expected at least one memory node"):
        load(write(tmp_path, GOOD[: GOOD.rindex("[[node]]")]))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Missing files, folders and binary files."""
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            load(path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load(tmp_path / "binary.toml")


TRANSPORT = """\
[transport]
kind = "rdma"
secret_file = "cluster.key"
busy_poll = true
peer_timeout = 5

[transport.rdma]
device = "mlx5_0"
port = 2
gid_index = 3
mtu = 4096
queue = 64

"""


def secured(folder: Path, secret: bytes = b"0123456789abcdef\n", mode: int = 0o600) -> Path:
    """A file of a cluster with other machines, and its secret."""
    (folder / "cluster.key").write_bytes(secret)
    (folder / "cluster.key").chmod(mode)
    return write(folder, TRANSPORT + GOOD.replace("127.0.0.1:7071", "10.0.0.2:7071") + 'rdma_device = "mlx5_1"\n')


def test_links_are_made_as_the_file_says(tmp_path: Path) -> None:
    """Nodes get everything, and each its own device; clients and monitors carry messages only."""
    config = load(secured(tmp_path))

    expected = Options(
        kind="rdma",
        peer_timeout=5.0,
        secret=b"0123456789abcdef",
        busy_poll=True,
        rdma=RdmaOptions(device="mlx5_0", port=2, gid_index=3, mtu=4096, queue=64),
    )
    assert config.options(config.front) == expected
    assert config.options(config.find("m0")) == replace(expected, rdma=replace(expected.rdma, device="mlx5_1"))
    assert config.options() == replace(expected, kind="control")
    assert "0123456789" not in repr(config)


@pytest.mark.parametrize(
    ("secret", "mode", "message"),
    [
        (b"0123456789abcdef", 0o660, r"open to others \(mode 0660\).*: chmod 600 .*cluster.key"),
        (b"0123456789abcdef", 0o444, r"open to others \(mode 0444\)"),
        (b"0123456789abcdef", 0o604, r"open to others \(mode 0604\)"),
        (b"0123456789abcde\n", 0o600, "expected a secret of 16 to 4096 bytes, got 15 bytes"),
        (b"", 0o400, "got 0 bytes"),
        (b"x" * 4097, 0o600, "got more"),
        (b"x" * 5000, 0o600, "got more"),
    ],
)
def test_a_secret_that_is_none_is_refused(secret: bytes, mode: int, message: str, tmp_path: Path) -> None:
    """What others can read, and what can be guessed; the message does not give it away."""
    with pytest.raises(ConfigError, match=f"transport.secret_file: .*{message}"):
        load(secured(tmp_path, secret, mode))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to others")
@pytest.mark.parametrize(
    ("owner", "group", "mode", "allowed"),
    [
        (0, 4242, 0o440, True),  # as Kubernetes mounts it with fsGroup 4242
        (0, 4242, 0o640, True),
        (0, 4242, 0o460, False),  # the group could change it
        (0, 4242, 0o444, False),
        (1234, 4242, 0o640, False),  # not root has chosen the group
    ],
)
def test_a_group_that_root_has_chosen_may_read_a_secret(owner: int, group: int, mode: int, allowed: bool) -> None:
    """A process of the group reads it, also through links; nothing that others can read is taken."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        (data := Path(folder) / "..data").mkdir()
        (data / "key").write_text("0123456789abcdef")
        os.chown(data / "key", owner, group)
        (data / "key").chmod(mode)
        (link := Path(folder) / "key").symlink_to(data / "key")
        groups = os.getgroups()
        try:
            os.setgroups([4242])
            os.setegid(65534)
            os.seteuid(65534)
            if allowed:
                assert read_secret(link) == b"0123456789abcdef"
            else:
                with pytest.raises(ConfigError, match="open to others"):
                    read_secret(link)
        finally:
            os.seteuid(0)
            os.setegid(0)
            os.setgroups(groups)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to others")
def test_a_group_that_this_process_is_not_in(tmp_path: Path) -> None:
    """It could read the secret, and this process does not know who that is."""
    file = secured(tmp_path, mode=0o640)
    os.chown(tmp_path / "cluster.key", 0, 4242)
    with pytest.raises(ConfigError, match="open to others"):
        load(file)


def test_a_secret_file_is_a_file(tmp_path: Path) -> None:
    """Neither a folder nor a pipe, which would keep everybody waiting."""
    (tmp_path / "folder").mkdir(0o700)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, message in (("folder", "cannot be read"), ("pipe", "not a regular file"), ("none", "`lamina secret ")):
        with pytest.raises(ConfigError, match=message):
            read_secret(tmp_path / name)


def test_a_secret_is_made_once(tmp_path: Path) -> None:
    """At random, for its owner alone, and never over another one."""
    write_secret(tmp_path / "one")
    write_secret(tmp_path / "two")

    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o600
    assert len(read_secret(tmp_path / "one")) == 64
    assert read_secret(tmp_path / "one") != read_secret(tmp_path / "two")
    with pytest.raises(ConfigError, match="exists already and is not overwritten"):
        write_secret(tmp_path / "one")
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        write_secret(tmp_path / "none" / "one")


@given(st.integers(1, 2**20), st.sampled_from(["KiB", "MiB", "GiB", "TiB"]))
def test_sizes_are_binary(count: int, unit: str) -> None:
    """Every whole number of a unit is exact."""
    exponent = {"KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}[unit]

    assert parse_size(f"{count}{unit}") == count * 2**exponent


@given(st.sets(st.integers(0, 500), min_size=1))
def test_processor_lists_say_what_they_mean(cpus: set[int]) -> None:
    """A list of single numbers gives exactly these."""
    assert parse_cpus(",".join(map(str, cpus))) == cpus


def test_processor_numbers_are_bounded() -> None:
    """No list makes a set larger than the numbers of five digits."""
    assert parse_cpus("0-99999,0-99999") == set(range(100_000))
    with pytest.raises(ConfigError, match="expected processor numbers"):
        parse_cpus("0-100000")


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_clear_error(text: str) -> None:
    """No other exception, and never less than a byte."""
    try:
        nbytes = parse_size(text)
    except ConfigError:
        return
    assert nbytes >= 1


@given(st.one_of(st.integers(1, 2**60), st.integers(1, 2**20).map(lambda count: count << 20)))
def test_any_size_has_a_text(nbytes: int) -> None:
    """The text is exact, to the byte."""
    assert parse_size(format_size(nbytes)) == nbytes


def test_sizes_are_written_for_people() -> None:
    """A fraction of the larger unit reads better than many of the smaller one."""
    sizes = {
        3 * 2**29: "1.5GiB",
        2**30: "1GiB",
        448 << 10: "448KiB",
        2**60: "1048576TiB",
        2**20 + 1: "1024.0009765625KiB",
    }
    assert {nbytes: format_size(nbytes) for nbytes in sizes} == sizes


@given(st.frozensets(st.integers(0, 99_999), min_size=1), st.integers(0, 99_999), st.integers(1, 99_999))
def test_processors_and_layers_have_a_text(cpus: frozenset[int], first: int, count: int) -> None:
    """What is written is read as it was meant."""
    layers = range(first, min(first + count, 100_000))

    assert parse_cpus(format_cpus(cpus)) == cpus
    assert parse_range(format_range(layers)) == layers
    assert format_cpus({0, 1, 2, 3, 8}) == "0-3,8"


# -- writing


def _some(*kinds: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), *kinds)


TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
SIZES = st.integers(1, 2**60)
MODELS = st.builds(
    ModelConfig,
    path=TEXTS.map(lambda text: text.replace("\0", "") or "m"),
    dtype=_some(st.sampled_from(["float32", "bfloat16", "float16"])),
    kv_dtype=_some(st.sampled_from(["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"])),
    context=_some(st.integers(1, 2**62)),
    compile=st.booleans(),
)
PIPELINES = st.builds(
    PipelineConfig,
    batches=st.integers(1, 32),
    max_batch=st.integers(1, 4096),
    prefill_tokens=st.integers(1, 65536),
    prefill_kv=SIZES,
    max_waiting=st.integers(1, 2**62),
    partition=st.sampled_from(["heads", "requests", "tokens"]),
)
TRANSPORTS = st.builds(
    TransportConfig,
    kind=st.sampled_from(["auto", "rdma", "shm", "tcp"]),
    busy_poll=st.booleans(),
    peer_timeout=st.floats(0.05, 3600),
    start_timeout=st.floats(0, 86400, exclude_min=True),
    rdma=st.builds(
        RdmaConfig,
        device=_some(TEXTS),
        port=_some(st.integers(1, 255)),
        gid_index=_some(st.integers(0, 65535)),
        mtu=_some(st.sampled_from([256, 512, 1024, 2048, 4096])),
        queue=st.integers(16, 16384),
    ),
)
RECOVERIES = st.builds(
    RecoveryConfig,
    grace=st.floats(0, 3600),
    lease=st.floats(0, 3600),
    journal=st.sampled_from(["off", "process", "machine"]),
    journal_dir=_some(TEXTS.map(lambda text: text.replace("\0", "") or "d")),
)
SHARED = {
    "cpus": _some(st.frozensets(st.integers(0, 99_999), min_size=1)),
    "threads": _some(st.integers(1, 1024)),
    "rdma_device": _some(TEXTS),
}


@st.composite
def node_lists(draw: st.DrawFn) -> list[NodeConfig]:
    """Some nodes of both roles, in any order, that fit together."""
    names = draw(st.lists(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True), min_size=2, unique=True))
    hosts = st.sampled_from(["127.0.0.1", "::1", "localhost", "127.3.2.1"])
    addresses = [Address("tcp", draw(hosts), draw(st.integers(100 * i + 1, 100 * i + 100))) for i in range(len(names))]
    bounds = draw(_some(st.lists(st.integers(1, 9), min_size=len(names), max_size=len(names))))
    nodes: list[NodeConfig] = []
    layer = 0
    for i, (name, address) in enumerate(zip(names, addresses, strict=True)):
        given = {"name": name, "address": address, **{key: draw(value) for key, value in SHARED.items()}}
        if i == 0 or (i > 1 and draw(st.booleans())):
            layers = range(layer, layer := layer + bounds[i]) if bounds else None
            device = draw(st.sampled_from(["cpu", "cuda:0", "cuda:12"]))
            nodes.append(ComputeNodeConfig(**given, device=device, layers=layers))
        else:
            memory = draw(SIZES)
            nodes.append(
                MemoryNodeConfig(
                    **given,
                    memory=memory,
                    quota=draw(_some(st.integers(1, memory))),
                    numa=draw(_some(st.integers(0, 4095))),
                    attention=draw(st.sampled_from(["auto", "native", "torch"])),
                )
            )
    return nodes


@settings(deadline=None)
@given(MODELS, node_lists(), PIPELINES, TRANSPORTS, RECOVERIES)
def test_what_is_written_is_read(
    model: ModelConfig,
    nodes: list[NodeConfig],
    pipeline: PipelineConfig,
    transport: TransportConfig,
    recovery: RecoveryConfig,
) -> None:
    """Every value, whatever characters and numbers are in it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cluster.toml"
        config = write_cluster(file, model, nodes, pipeline=pipeline, transport=transport, recovery=recovery)
        assert (config.model, config.node) == (model, nodes)
        assert (config.pipeline, config.transport, config.recovery) == (pipeline, transport, recovery)
        assert config == load(file)


C0 = ComputeNodeConfig(name="c0", address=Address("tcp", "127.0.0.1", 7070))
M0 = MemoryNodeConfig(name="m0", address=Address("tcp", "127.0.0.1", 7071), memory=2**30)


def test_a_written_file_says_what_differs(tmp_path: Path) -> None:
    """Defaults are left out, so that people find what was chosen."""
    file = tmp_path / "cluster.toml"
    write_cluster(file, ModelConfig(path="models/tiny"), [C0, M0], pipeline=PipelineConfig(max_batch=8))

    assert (
        file.read_text()
        == """\
[model]
path = "models/tiny"

[pipeline]
max_batch = 8

[[node]]
role = "compute"
name = "c0"
address = "tcp://127.0.0.1:7070"

[[node]]
role = "memory"
name = "m0"
address = "tcp://127.0.0.1:7071"
memory = "1GiB"
"""
    )


def test_secret_and_certificates_are_written(tmp_path: Path) -> None:
    """The files are named as they were given, and read at once."""
    write_secret(tmp_path / "cluster.key")
    far = MemoryNodeConfig(name="m1", address=Address("tcp", "10.0.0.2", 7071), memory=2**30)
    transport = TransportConfig(secret_file="cluster.key")  # noqa: S106 - the name of a file
    config = write_cluster(tmp_path / "cluster.toml", ModelConfig(path="m"), [C0, far], transport=transport)

    assert config.transport == transport
    assert config.links.secret == read_secret(tmp_path / "cluster.key")


@pytest.mark.parametrize(
    ("name", "path", "nodes", "message"),
    [
        ("none/cluster.toml", "m", [C0, M0], "cannot be written: No such file"),
        ("cluster.toml", "m\ud800", [C0, M0], r"cannot be written: '\\ud800' is not Unicode"),
        ("cluster.toml", "m", [C0], "node: expected at least one memory node, got none"),
        ("cluster.toml", "m", [C0, M0, M0], r"node\[2\].name: 'm0' is used twice"),
    ],
)
def test_what_cannot_be_written_is_named(
    name: str, path: str, nodes: list[NodeConfig], message: str, tmp_path: Path
) -> None:
    """The file, and what is wrong with it or with its parts."""
    with pytest.raises(ConfigError, match=f"{name}: {message}"):
        write_cluster(tmp_path / name, ModelConfig(path=path), nodes)


def test_a_node_may_listen_elsewhere(tmp_path: Path) -> None:
    """Others reach it by its address; it listens at its own."""
    file = secured(tmp_path)
    file.write_text(file.read_text().replace("numa = 1", 'numa = 1\nlisten = "0.0.0.0:7999"'))
    node = load(file).find("m0")

    assert (node.address, node.bind) == (Address("tcp", "10.0.0.2", 7071), Address.parse("0.0.0.0:7999"))
    assert load(file).front.bind == load(file).front.address


TABLES = {"model": ModelConfig, "pipeline": PipelineConfig, "transport": TransportConfig, "recovery": RecoveryConfig}


@pytest.mark.parametrize("wrong", ["-8", "[]", "{ x = 1 }", "nan", '"\\u0000"'])
@pytest.mark.parametrize(
    ("table", "key"), [(table, key) for table in TABLES for key in TABLES[table].__struct_fields__]
)
def test_a_wrong_value_is_answered_in_words_of_the_file(table: str, key: str, wrong: str, tmp_path: Path) -> None:
    """The answer names table and key, and says neither null nor object, which no TOML file has."""
    tables = {"model": {"path": '"m"'}, **{name: {} for name in TABLES if name != "model"}}
    tables[table][key] = wrong
    text = "".join(f"[{name}]\n" + "".join(f"{k} = {v}\n" for k, v in keys.items()) for name, keys in tables.items())
    file = write(tmp_path, text + GOOD[GOOD.index("[[node]]") :])
    if (key, wrong) == ("path", '"\\u0000"'):
        return  # what is no path is found when the model is opened

    with pytest.raises(ConfigError, match=rf"{table}\.{key}|{table}: |{table}\.tls") as caught:
        load(file)

    assert not re.search(r"null|[Oo]bject", str(caught.value).replace("null byte", ""))
