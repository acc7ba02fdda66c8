"""A cluster file is read as it is meant, or refused with a sentence that says where and why."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.config import load, parse_cpus, parse_size
from lamina.errors import ConfigError

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
    assert memory.memory_bytes == 3 * 2**29
    assert memory.pinned == {0, 1}
    assert (memory.numa, memory.attention) == (1, "torch")
    assert config.model.kv_dtype is None
    assert (memory.listen.host, memory.listen.port) == ("127.0.0.1", 7071)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('memory = "1.5GiB"', 'memory = "lots"', "node[1].memory: expected a size like \"16GiB\", got 'lots'"),
        ('memory = "1.5GiB"', "memory = 16", "node[1].memory: expected str | null, got 16"),
        ('memory = "1.5GiB"', "", 'node[1].memory: missing; expected a size like "16GiB"'),
        ('memory = "1.5GiB"', 'memory = "0GiB"', "node[1].memory: expected a size like \"16GiB\", got '0GiB'"),
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
        ("max_batch = 8", 'partition = "tokens"', "pipeline.partition: expected one of heads; got 'tokens'"),
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
        ("numa = 1", 'numa = "0"', "node[1].numa: expected int | null, got '0'"),
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
        ('name = "m0"', 'name = "c0"', "node[1].name: 'c0' is used twice"),
        ('name = "m0"', 'name = "m 0"', "node[1].name: expected str matching regex"),
        ("127.0.0.1:7071", "127.0.0.1:7070", "node[1].address: '127.0.0.1:7070' is already the address of 'c0'"),
        ("127.0.0.1:7071", "10.0.0.2:7071", "node[1].address: '10.0.0.2:7071' is not a loopback address"),
        ("127.0.0.1:7071", "127.0.0.1:99999", "node[1].address: "),
        ("127.0.0.1:7071", "tcp://127.0.0.1", "node[1].address: "),
        ('role = "memory"', 'role = "compute"', "node[1].memory: expected no memory on a compute node"),
        ('cpus = "0-1"', 'device = "cuda:0"', "node[1].device: expected no device on a memory node"),
        ('role = "compute"', 'role = "compute"\ndevice = "gpu"', 'node[0].device: expected "cpu" or "cuda:N"'),
        (
            "[pipeline]",
            '[transport]\nkind = "rdma"\n[pipeline]',
            "transport.kind: expected one of auto, tcp; got 'rdma'",
        ),
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
        ("[pipeline]", "[surprise]\n[pipeline]", "unknown key 'surprise'"),
        ("[pipeline]", "[pipeline", "not valid TOML"),
        ("[model]", 'file = "x"\n[model]', "unknown key 'file'"),
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


def test_exactly_one_compute_node_is_asked_for(tmp_path: Path) -> None:
    """What is not supported is refused, not ignored."""
    second = '[[node]]\nname = "c1"\nrole = "compute"\naddress = "tcp://127.0.0.1:7072"\n'

    with pytest.raises(ConfigError, match=r"node\[2\].role: expected exactly one compute node, got 2"):
        load(write(tmp_path, GOOD + second))
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
