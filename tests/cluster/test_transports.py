"""What nodes agree on, by which way, and whom they refuse."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import lamina
from lamina.config import ClusterConfig, write_secret
from lamina.demo.run import CHECKPOINT
from lamina.demo.stories import DEMO_PROMPT
from lamina.errors import LaminaError
from tests import harness
from tests.cluster.test_families import PROMPTS
from tests.families import FAMILIES
from tests.harness import Wiring
from tests.oracle import Agreement, Oracle


@pytest.fixture(scope="module", autouse=True)
def _own_choice(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("transport", None):
        pytest.skip("these tests choose transports themselves, on one ordinary machine")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"].save(tmp_path_factory.mktemp("llama") / "checkpoint")


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Wiring:
    """A cluster with a secret and certificates."""
    return harness.wire("tls", tmp_path_factory.mktemp("tls"))


async def answers(config: ClusterConfig) -> list[list[int]]:
    async with harness.client(config) as client:
        return [a.tokens for a in await asyncio.gather(*(client.generate(p, max_tokens=24) for p in PROMPTS[:3]))]


def test_an_encrypted_cluster(checkpoint: Path, tls: Wiring, agreement: Agreement, tmp_path: Path) -> None:
    """Token for token, with memory nodes of the file and without one, and over the lanes of tcp."""
    ports = harness.free_ports(2)
    config = harness.write_config(tmp_path, checkpoint, ports, wiring=tls)
    nodes = [
        harness.start_memory(tmp_path, ports[0], wiring=tls),
        *(harness.start_node(config, n) for n in ("m1", "c0")),
    ]

    async def main() -> list[list[int]]:
        status = await harness.ready(config, nodes[-1])
        assert [p.transport for p in status.peers] == ["tcp", "tcp"]
        return await answers(config)

    with harness.running(*nodes):
        oracle = Oracle(checkpoint)
        for prompt, tokens in zip(PROMPTS, asyncio.run(main()), strict=False):
            agreement.check(oracle, prompt, tokens, "tls")
        for node in reversed(nodes):
            assert node.stop() == 0


def test_strangers_are_refused(checkpoint: Path, tls: Wiring, tmp_path: Path) -> None:
    """Without the secret or with another one, without a certificate or with a stranger's; nobody else is harmed."""
    config = harness.write_config(tmp_path, CHECKPOINT, harness.free_ports(1), wiring=tls)
    plain = harness.write_config(
        _folder(tmp_path / "plain"), CHECKPOINT, harness.free_ports(1), wiring=replace(tls, tls=None)
    )
    nodes = [harness.start_node(c, name) for c in (config, plain) for name in ("m0", "c0")]
    secret, files = config.links.secret, config.links.tls
    other = harness.certificates(tmp_path, "stranger")

    async def main() -> None:
        for cluster, strangers in (
            (config, [(None, None), (secret, None), (None, files), (b"x" * 32, files), (secret, other)]),
            (plain, [(None, None), (b"x" * 32, None), (secret, files)]),
        ):
            await harness.ready(cluster, nodes[1] if cluster is config else nodes[3])
            for theirs, certificate in strangers:
                with pytest.raises(LaminaError) as caught:
                    async with lamina.connect(
                        cluster.front.address, secret=theirs, tls=certificate, deadline_s=2
                    ) as stranger:
                        await stranger.status()
                assert secret is not None
                assert secret.hex() not in str(caught.value)
                assert "x" * 32 not in str(caught.value)
            async with harness.client(cluster) as client:
                assert len((await client.generate([1], max_tokens=3)).tokens) == 3

    with harness.running(*nodes):
        asyncio.run(main())
        command = [sys.executable, "-m", "lamina", "generate", str(config.file), DEMO_PROMPT, "--max-tokens", "5"]
        printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert printed.returncode == 0, printed.stderr
        assert len(printed.stdout) > 5


def test_another_secret_is_named(checkpoint: Path, tmp_path: Path) -> None:
    """The compute node ends with a sentence, the memory node goes on."""
    mine, theirs = tmp_path / "mine.key", tmp_path / "theirs.key"
    write_secret(mine)
    write_secret(theirs)
    (port,) = harness.free_ports(1)
    memory = harness.start_memory(tmp_path, port, wiring=Wiring(secret=theirs))
    config = harness.write_config(tmp_path, checkpoint, [port], wiring=Wiring(secret=mine))
    with harness.running(memory):
        compute = harness.start_node(config, "c0")
        with harness.running(compute):
            assert compute.wait(40) == 1
        log = compute.log.read_text()
        assert "secret" in log.partition("event=failed")[2]
        assert "Traceback" not in log
        assert memory.stop() == 0


@pytest.mark.parametrize(
    ("compute", "memory", "taken"),
    [("auto", "auto", "shm"), ("auto", "tcp", "tcp"), ("shm", "auto", "shm"), ("tcp", "auto", "tcp")],
)
def test_what_was_asked_and_chosen_is_told(
    compute: str, memory: str, taken: str, checkpoint: Path, tmp_path: Path
) -> None:
    """In the logs of both nodes, and in the status of the compute node."""
    (port,) = harness.free_ports(1)
    node = harness.start_memory(tmp_path, port, wiring=Wiring(memory))
    config = harness.write_config(tmp_path, checkpoint, [port], wiring=Wiring(compute))
    front = harness.start_node(config, "c0")
    with harness.running(node, front):
        status = asyncio.run(harness.ready(config, front))
        assert [p.transport for p in status.peers] == [taken]
        assert status.peers[0].choice.endswith(f"took {taken}")
        asked = rf"asked: {compute} \(c0\), {memory} \(memory-{port}\)"
        assert re.search(
            rf"event=connected peer=m0 transport={taken} choice=.*{asked}.*took {taken}", front.log.read_text()
        )
        assert re.search(rf"event=attached peer=c0 transport={taken} choice=.*{asked}", node.log.read_text())


@pytest.mark.parametrize(
    ("compute", "memory", "message"),
    [("shm", "tcp", "demands transport shm"), ("rdma", "auto", "rdma: ")],
)
def test_a_demanded_transport_is_no_wish(
    compute: str, memory: str, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    """What cannot be had ends the compute node, with the step that failed; nothing else is taken instead."""
    if compute == "rdma" and any(Path("/sys/class/infiniband").glob("*")):
        pytest.skip("this machine has RDMA")
    (port,) = harness.free_ports(1)
    node = harness.start_memory(tmp_path, port, wiring=Wiring(memory))
    config = harness.write_config(tmp_path, checkpoint, [port], wiring=Wiring(compute))
    with harness.running(node):
        front = harness.start_node(config, "c0")
        with harness.running(front):
            assert front.wait(40) in (1, 2)
        failure = front.log.read_text().partition("event=failed")[2]
        assert message in failure
        assert "event=connected" not in front.log.read_text()
        assert node.stop() == 0


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
