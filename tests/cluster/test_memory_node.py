"""A memory node outlives its compute nodes, lends them its memory, and refuses what it cannot hold."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lamina.attention import LayerShape
from lamina.attention.backend import require_backend
from lamina.errors import ConfigError
from lamina.transport import Address, Hello, Region, connect
from lamina.wire.codec import encode
from lamina.wire.tenants import Attach
from tests import harness
from tests.families import FAMILIES

CACHE_MIB = 512


def resident_mib(node: harness.Node) -> float:
    """Memory of a process that is really there."""
    lines = Path(f"/proc/{node.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def test_the_memory_is_taken_at_the_start_and_lent(tmp_path: Path) -> None:
    """All of it is there before anybody attaches, the log says so, and attach by attach it becomes no more."""
    path = FAMILIES["llama"].save(tmp_path / "checkpoint")
    (port,) = harness.free_ports(1)
    memory = harness.start_memory(tmp_path, port, memory=f"{CACHE_MIB}MiB")
    config = harness.write_config(tmp_path, path, [port])

    async def waiting() -> bool:
        status = await harness.status_of(config, config.memory_nodes[0])
        return (status.state, status.waiting_for) == ("waiting", "a compute node")

    sizes = []
    with harness.running(memory):
        asyncio.run(harness.eventually(waiting, 30))
        sizes.append(resident_mib(memory))
        for _ in range(2):
            compute = harness.start_node(config, "c0")
            with harness.running(compute):
                asyncio.run(harness.ready(config, compute))
                sizes.append(resident_mib(memory))
                assert compute.stop() == 0
        assert memory.stop() == 0

    assert sizes[0] > CACHE_MIB
    assert max(sizes) < sizes[0] + CACHE_MIB / 2
    told = rf"event=memory bytes={CACHE_MIB << 20} huge_page_bytes=\d+ numa=\w+ attention=\w+ isa=\w+ threads=1"
    assert re.search(told, memory.log.read_text())


SLOW = """if True:
    import time
    import lamina.node.memory

    take = lamina.node.memory.Memory

    def slow(*given, **more):
        time.sleep(60)
        return take(*given, **more)

    lamina.node.memory.Memory = slow
    from lamina.cli import main
    main()
"""


def test_a_node_that_still_takes_its_memory_can_be_stopped() -> None:
    """Much memory takes long; SIGTERM ends the node at once, with the status of one that was told to stop."""
    (port,) = harness.free_ports(1)
    own = ["node", "--role", "memory", "--listen", f"tcp://127.0.0.1:{port}", "--memory", "1MiB"]
    process = subprocess.Popen([sys.executable, "-c", SLOW, *own], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        while "event=listening" not in process.stderr.readline():
            assert process.poll() is None
        process.terminate()

        assert process.wait(20) == 0
        assert "event=stopped" in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("attention", ["auto", "native"])
def test_an_unknown_instruction_set_is_refused_at_the_start(attention: str) -> None:
    """Not at the first attach, and not by falling back to a slower backend."""
    try:
        require_backend("native")
    except ConfigError as error:
        pytest.skip(str(error))
    (port,) = harness.free_ports(1)
    own = ["node", "--role", "memory", "--listen", f"tcp://127.0.0.1:{port}", "--memory", "1MiB"]
    command = [sys.executable, "-m", "lamina", *own, "--attention", attention]
    environment = {**os.environ, "LAMINA_ISA": "foo"}
    node = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)

    assert node.returncode == 2
    assert re.search(r"LAMINA_ISA: expected one of .*, which this machine can run, got 'foo'", node.stderr)
    assert "Traceback" not in node.stderr


def test_a_compute_node_that_asks_for_what_cannot_be_is_told_so(tmp_path: Path) -> None:
    """It does not wait for ever for an answer on a link that is in order, and the next one is served."""
    (port,) = harness.free_ports(1)
    memory = harness.start_memory(tmp_path, port, wiring=harness.Wiring())
    layer = LayerShape(q_heads=2, kv_heads=1, qk_dim=8, v_dim=8, scale=1.0)

    async def refusal() -> str:
        address = Address.parse(f"127.0.0.1:{port}")
        async with await connect(address, Hello("compute", "odd"), deadline_s=20) as link:
            told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            link.deliver(on_message=lambda plain: told.set_result(plain["reason"]))
            outputs = link.expose(Region("outputs", 3))
            types = {"dtype": "float32", "kv_dtype": "float32", "block_tokens": 16, "slots": 1, "max_rows": 1}
            tenant = {"tenant": "odd", "token": bytes(16), "term": 1, "model": "odd"}
            link.send(encode(Attach(**tenant, layers=[layer], outputs=outputs, **types)))
            return await asyncio.wait_for(told, 20)

    with harness.running(memory):
        for _ in range(2):
            assert "region 'outputs' of 3 bytes where 256 are needed" in asyncio.run(refusal())
        assert memory.stop() == 0
