"""Starting a cluster: in any order, and with every mistake told in a sentence."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lamina import AsyncClient
from lamina.config import ClusterConfig, RecoveryConfig
from lamina.errors import NodeError
from lamina.transport import PROTOCOL_VERSION
from tests import harness
from tests.families import FAMILIES


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"].save(tmp_path_factory.mktemp("llama") / "checkpoint")


def test_start_order_does_not_matter(checkpoint: Path, tmp_path: Path) -> None:
    """The compute node waits for its memory nodes, says for whom, and sends clients away meanwhile."""
    config = harness.write_config(tmp_path, checkpoint, harness.free_ports(2))
    compute, first = harness.start_node(config, "c0"), harness.start_node(config, "m0")

    async def main() -> None:
        async with harness.client(config, deadline_s=30) as client:

            async def only_one_missing() -> bool:
                return (await client.status()).waiting_for == "m1"

            await harness.eventually(only_one_missing, 30)
            with pytest.raises(NodeError, match="c0 is still starting; it waits for m1"):
                await client.generate([1])
            second = harness.start_node(config, "m1")
            with harness.running(second):
                await harness.ready(config, compute)
                assert len((await client.generate([1], max_tokens=3)).tokens) == 3

    with harness.running(compute, first):
        asyncio.run(main())


def fails(arguments: list[str], status: int, *, timeout_s: float = 60) -> str:
    """Run the command, which must fail with one sentence and no traceback; the sentence."""
    done = subprocess.run(
        [sys.executable, "-m", "lamina", *arguments], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def cannot_start(config: ClusterConfig, status: int) -> str:
    """Run the compute node, which must fail without a traceback; its log."""
    node = harness.start_node(config, "c0")
    with harness.running(node):
        assert node.wait(40) == status
    log = node.log.read_text()
    assert "Traceback" not in log
    return log


def test_a_memory_node_that_is_not_there(checkpoint: Path, tmp_path: Path) -> None:
    """Named, with the deadline."""
    config = harness.write_config(tmp_path, checkpoint, harness.free_ports(1), start_timeout=0.5)
    message = cannot_start(config, 1)
    assert "memory node m0 could not be reached within 0.5 s" in message


def no_directory(path: Path) -> None:
    shutil.rmtree(path)


def linear_attention(path: Path) -> None:
    config = {"model_type": "qwen3_next", "num_hidden_layers": 4}
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [(no_directory, "no such checkpoint directory"), (linear_attention, "layers of type linear_attention")],
)
def test_a_wrong_model_where_no_other_node_is(
    damage: Callable[[Path], None], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    """It is told at once, not after the wait for other nodes, which is a minute."""
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    damage(copy)
    config = harness.write_config(tmp_path, copy, harness.free_ports(1))
    assert message in cannot_start(config, 1)


def test_a_memory_node_of_another_release(checkpoint: Path, tmp_path: Path) -> None:
    """The compute node names both protocol versions and ends."""
    (port,) = harness.free_ports(1)
    config = harness.write_config(tmp_path, checkpoint, [port])
    code = f"""if True:
        import sys
        from lamina.transport import frames
        frames.PROTOCOL_VERSION = {PROTOCOL_VERSION + 1}
        from lamina.cli import main
        sys.argv[1:] = ["node", {str(config.file)!r}, "--name", "m0"]
        main()
    """
    other = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        message = cannot_start(config, 1)
    finally:
        other.kill()
        other.wait()
    (failure,) = (line for line in message.splitlines() if "event=failed" in line)
    assert f"speaks protocol version {PROTOCOL_VERSION + 1}, this end speaks version {PROTOCOL_VERSION}" in failure


def test_a_port_in_use(tmp_path: Path) -> None:
    """Named."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        message = fails(["node", "--role", "memory", "--listen", address, "--memory", "1MiB"], 1)
    assert address in message
    assert "another process uses the port" in message


def test_a_journal_that_cannot_be_kept(checkpoint: Path, memory_ports: list[int], tmp_path: Path) -> None:
    """Its place is named, and what to do, before any client comes."""
    (tmp_path / "file").write_text("")
    recovery = RecoveryConfig(journal_dir="file")
    config = harness.write_config(tmp_path, checkpoint, memory_ports[:1], recovery=recovery)
    log = cannot_start(config, 2)
    assert f"recovery.journal_dir: {tmp_path}/file/requests.journal cannot be opened: File exists; name a folder" in log


def test_too_little_memory(checkpoint: Path, memory_ports: list[int], tmp_path: Path) -> None:
    """Both numbers and what would help; the memory node goes on."""
    (port,) = harness.free_ports(1)
    small = harness.start_memory(tmp_path, port, memory="256KiB")
    config = harness.write_config(tmp_path, checkpoint, [port])
    with harness.running(small):
        message = cannot_start(config, 1)
        assert re.search(r"can hold \d+ tokens of one request, fewer than", message)
        assert "context of 512" in message
        assert small.stop() == 0


def test_a_client_learns_why_a_start_fails(checkpoint: Path, tmp_path: Path) -> None:
    """In the words of the node, which it gets before the link is closed."""
    (port,) = harness.free_ports(1)
    config = harness.write_config(tmp_path, checkpoint, [port])
    compute = harness.start_node(config, "c0")

    async def asked(client: AsyncClient, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await client.status()

    async def main(nodes: ExitStack) -> None:
        async with harness.client(config, deadline_s=30) as client:
            nodes.enter_context(harness.running(harness.start_memory(tmp_path, port, memory="256KiB")))
            with pytest.raises(NodeError, match=r"compute node c0 failed: the memory nodes can hold \d+ tokens"):
                await asyncio.gather(*(asked(client, 0.05 * i) for i in range(600)))

    with harness.running(compute), ExitStack() as nodes:
        asyncio.run(main(nodes))


def test_too_many_memory_nodes(checkpoint: Path, memory_ports: list[int], tmp_path: Path) -> None:
    """More than there are KV heads."""
    ports = [*memory_ports, *harness.free_ports(2)]
    extra = [harness.start_memory(tmp_path, port) for port in ports[3:]]
    config = harness.write_config(tmp_path, checkpoint, ports)
    with harness.running(*extra):
        message = cannot_start(config, 2)
    assert "4 KV heads in a layer, which cannot be split over 5 memory nodes (m0, m1, m2, m3, m4)" in message


def test_options_override_the_file(checkpoint: Path, tmp_path: Path) -> None:
    """Processors and NUMA node depend on the machine more than on the cluster."""
    config = harness.write_config(tmp_path, checkpoint, harness.free_ports(1))
    own = [str(config.file)]

    bound = harness.start(tmp_path / "bound.log", "node", "--role", "memory", "--name", "m0", *own, "--numa", "4095")
    with harness.running(bound):
        assert bound.wait() == 2
    assert "numa: expected one of this machine's NUMA nodes" in bound.log.read_text()
    (tmp_path / "pinned.log").touch()
    pinned = harness.start(tmp_path / "pinned.log", "node", "--role", "memory", "--name", "m0", *own, "--cpus", "0")
    with harness.running(pinned):
        deadline = time.monotonic() + 20
        while "event=memory" not in pinned.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert pinned.process.pid
        assert os.sched_getaffinity(pinned.process.pid) == {0}
    compute = fails(["node", "--role", "compute", "--name", "c0", *own, "--numa", "0"], 2)
    assert "--numa: not allowed for a compute node" in compute


def remove_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def cut_weights(path: Path) -> None:
    os.truncate(path / "model.safetensors", 1000)


def change_model(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "teapot"}))


def lengthen(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))


def slow(*values: object) -> Any:
    """A case that is also covered where checkpoints are read."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such checkpoint directory"),
        slow(remove_weights, "neither model.safetensors nor model.safetensors.index.json"),
        (cut_weights, "model.safetensors: not a readable safetensors file"),
        slow(change_model, "'teapot'"),
        (lengthen, "missing from the checkpoint"),
    ],
)
def test_a_damaged_checkpoint(
    damage: Callable[[Path], None], message: str, checkpoint: Path, memory_ports: list[int], tmp_path: Path
) -> None:
    """The file or tensor is named."""
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    damage(copy)
    config = harness.write_config(tmp_path, copy, memory_ports[:1])
    node = harness.start_node(config, "c0")
    with harness.running(node):
        assert node.wait(40) == 1
    assert message in node.log.read_text()
    assert "Traceback" not in node.log.read_text()


JOIN = "--join 127.0.0.1:1 --name n9 --listen 127.0.0.1:2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["node", "--role", "gpu"], "--role: expected compute or memory, got 'gpu'"),
        (["node", "--role", "memory"], "--listen and --memory"),
        (["convert", "x", "--dtype", "int4"], "--dtype: expected one of float32, bfloat16, float16; got 'int4'"),
        (["node", "--role", "memory", "--listen", "tcp://0.0.0.0:1", "--memory", "1GiB"], "loopback"),
        (["node", "--role", "memory", "--listen", "x", "--memory", "1GiB"], "'x'"),
        (
            ["node", "--role", "memory", "--listen", "tcp://127.0.0.1:1", "--memory", "much"],
            "--memory: expected a size",
        ),
        (
            ["node", "--role", "memory", "--listen", "tcp://127.0.0.1:1", "--memory", "1MiB", "--cpus", "x"],
            "--cpus: expected processor numbers",
        ),
        (
            [
                "node",
                "--role",
                "memory",
                "--listen",
                "tcp://127.0.0.1:1",
                "--memory",
                "1MiB",
                "--cpus",
                "0,99990-99999",
            ],
            "cpus: this process has no processors 99990, 99991, 99992, 99993, 99994, 99995, 99996, 99997 and 2 more",
        ),
        (
            ["node", "--role", "memory", "--listen", "tcp://127.0.0.1:1", "--memory", "1MiB", "--attention", "fast"],
            "--attention: expected one of auto, native, torch; got 'fast'",
        ),
        (["node", "--role", "compute"], "CONFIG: missing"),
        (
            ["node", "--role", "compute", "--join", "127.0.0.1:1"],
            "--listen and --name: a compute node with --join needs both",
        ),
        (
            f"node --role compute {JOIN} --memory 1GiB".split(),
            "--memory: not allowed for a compute node, which holds no",
        ),
        (f"node --role compute {JOIN} --device tpu".split(), "--device: expected"),
        (
            ["node", "--role", "memory", "--join", "x", "--listen", "127.0.0.1:2", "--memory", "1MiB"],
            "--join: 'x': the port is missing",
        ),
        (f"node --role memory {JOIN} --memory 1MiB --name a/b".split(), "--name: expected a name like"),
        (f"node --role memory {JOIN} --memory 1MiB --device cpu".split(), "--device: not allowed for a memory node"),
        (["node", "--role", "memory", "--address", "127.0.0.1:1"], "--address: not allowed without --join"),
        (["node", "none.toml", "--name", "c0", "--join", "127.0.0.1:1"], "--join: not allowed with a cluster file"),
        (["node", "none.toml", "--name", "c0"], "none.toml"),
        (["up", "none.toml"], "none.toml"),
        (["generate", "none.toml", "hello"], "none.toml"),
        (["generate"], "missing argument"),
        (["teapot"], "no such command"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], message: str) -> None:
    """Exit status 2 and what was expected."""
    assert message in fails(arguments, 2)


def test_no_front_to_generate_from(checkpoint: Path, tmp_path: Path) -> None:
    """The address, after a short wait."""
    config = harness.write_config(tmp_path, checkpoint, harness.free_ports(1))
    started = time.monotonic()
    message = fails(["generate", str(config.file), "hello"], 1)
    assert str(config.front.address).removeprefix("tcp://") in message
    assert time.monotonic() - started < 30


def test_importing_lamina_is_cheap() -> None:
    """Neither torch nor transformers, for whoever only wants the client or the errors."""
    code = (
        "import sys, lamina, lamina.errors, lamina.client, lamina.config, lamina.cli; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
