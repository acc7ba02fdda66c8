"""`lamina doctor` on this machine, on machines that exist only as files, and beside clusters in every state."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lamina.config import ClusterConfig, load, write_secret
from lamina.demo.run import CHECKPOINT
from lamina.node.probe import MAX_ECHOES, ROLE, measure
from lamina.ops.doctor import machine
from lamina.ops.doctor.finding import Finding, guarded
from lamina.runtime.sockets import Sockets
from lamina.transport import Hello, Link, Options, Region, connect
from lamina.wire.admin import EchoRegion, Probe, Probed
from lamina.wire.codec import decode, encode
from tests import harness
from tests.harness import Wiring

SECRET = b"0123456789abcdef"


def doctor(*arguments: str, status: int) -> dict[str, Any]:
    """Run the command; what it printed. It never ends in a traceback, and its table is as long as its JSON."""
    command = [sys.executable, "-m", "lamina", "doctor", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.stderr == ""
    facts: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == status, facts
    assert facts["healthy"] is (status == 0)
    return facts


def line(facts: dict[str, Any], item: str) -> dict[str, str]:
    (found,) = (f for f in facts["findings"] if f["item"] == item)
    return {key: value for key, value in found.items() if key != "item"}


def test_this_machine_is_looked_at() -> None:
    """As a table that names every item, its state, what was found and what to do."""
    done = subprocess.run(
        [sys.executable, "-m", "lamina", "doctor"],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )

    assert done.returncode == 0, done.stdout
    assert done.stderr == ""
    for word in ("item", "state", "found", "what to do", "Python", "torch", "NUMA", "huge pages", "locked memory"):
        assert word in done.stdout
    for item in (
        "attention kernel",
        "compiling",
        "file descriptors",
        "GPU",
        "RDMA devices",
        "transport tcp",
        "transport shm",
    ):
        assert item in done.stdout
    assert re.search(r"\d+ fail, \d+ warn\n$", done.stdout)


def test_a_machine_that_cannot_compile(tmp_path: Path) -> None:
    """It hears so before its first run, what to do, and that Lamina runs all the same."""
    variables = {key: value for key, value in os.environ.items() if key != "CXX"}
    done = subprocess.run(
        [sys.executable, "-m", "lamina", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env={**variables, "PATH": str(tmp_path)},
    )

    found = line(json.loads(done.stdout), "compiling")
    assert found["state"] == "warn"
    assert found["found"] == "there is no C++ compiler g++, so compute nodes run the model uncompiled, which is slower"
    assert found["do"].startswith("install g++, or let CXX name another compiler; model.compile = false")
    assert done.stderr == ""


def test_a_check_that_fails_is_a_line() -> None:
    """Whatever it meets."""

    def broken() -> list[Finding]:
        raise ValueError("nobody thought of this")

    (found,) = guarded("thing", broken)
    assert (found.item, found.state) == ("thing", "warn")
    assert "ValueError: nobody thought of this" in found.found


def test_a_host_name_that_means_this_machine_alone(tmp_path: Path) -> None:
    """Each node whose name is a loopback address here, and what to do; not one that listens elsewhere."""
    config = write_config(tmp_path, 2)
    write_secret(tmp_path / "cluster.key")
    text = config.file.read_text().replace("[transport]", '[transport]\nsecret_file = "cluster.key"')
    first, second = (node.address for node in config.memory_nodes)
    text = text.replace(f'"{first}"', f'"tcp://127.1:{first.port}"')
    text = text.replace(f'"{second}"', f'"tcp://127.1:{second.port}"\nlisten = "tcp://0.0.0.0:{second.port}"')
    config.file.write_text(text)

    (finding,) = machine.addresses(load(config.file))

    assert (finding.item, finding.state) == ("address of m0", "warn")
    assert finding.found == "127.1 is 127.0.0.1 on this machine, where no other machine reaches it"
    assert "/etc/hosts" in finding.do
    assert f"listen = 'tcp://0.0.0.0:{first.port}'" in finding.do


# -- machines that this one is not


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


PORT = "sys/class/infiniband/mlx5_0/ports/1"
ROCE = {
    "dev/infiniband/uverbs0": "",
    "sys/class/net/eth0/mtu": "4200",
    f"{PORT}/state": "4: ACTIVE",
    f"{PORT}/link_layer": "Ethernet",
    f"{PORT}/rate": "100 Gb/sec (4X EDR)",
    f"{PORT}/gids/0": "fe80:0000:0000:0000:0000:00ff:fe00:0001",
    f"{PORT}/gids/1": "0000:0000:0000:0000:0000:ffff:0a00:0001",
    f"{PORT}/gids/2": "0000:0000:0000:0000:0000:ffff:0a00:0001",
    f"{PORT}/gids/3": "0000:0000:0000:0000:0000:0000:0000:0000",
    f"{PORT}/gid_attrs/types/0": "RoCE v2",
    f"{PORT}/gid_attrs/types/1": "IB/RoCE v1",
    f"{PORT}/gid_attrs/types/2": "RoCE v2",
    f"{PORT}/gid_attrs/ndevs/0": "eth0",
}


@pytest.mark.parametrize(
    ("changes", "state", "found", "do"),
    [
        ({}, "ok", r"ACTIVE, Ethernet, 100 Gb/sec .*, eth0 with MTU 4200, GID 2 is 10.0.0.1 \(RoCE v2\)", ""),
        ({f"{PORT}/state": "1: DOWN"}, "warn", "DOWN, Ethernet", "bring its network interface up"),
        ({f"{PORT}/gid_attrs/types/2": "IB/RoCE v1"}, "warn", "no GID of RoCE v2", "ip address add .* dev eth0"),
        ({"sys/class/net/eth0/mtu": "1500"}, "warn", "MTU 1500", "ip link set eth0 mtu 4200"),
        ({f"{PORT}/link_layer": "InfiniBand", f"{PORT}/lid": "0x7"}, "ok", "ACTIVE, InfiniBand, .*LID 0x7", ""),
        ({f"{PORT}/link_layer": "InfiniBand", f"{PORT}/state": "2: INIT"}, "warn", "INIT", "opensm"),
    ],
)
def test_ports_are_told_as_the_kernel_knows_them(
    changes: dict[str, str], state: str, found: str, do: str, tmp_path: Path
) -> None:
    """Devices, ports, state, kind, GIDs and MTU, without any library."""
    root = put(tmp_path, {**ROCE, **changes})
    findings = {f.item: f for f in machine.rdma_devices(demanded=False, root=root)}

    port = findings["mlx5_0 port 1"]
    assert port.state == state
    assert re.search(found, port.found)
    assert re.search(do, port.do)
    assert "pyverbs" in findings


def test_rdma_that_is_demanded_must_be_there(tmp_path: Path) -> None:
    """Red, and not only a remark."""
    (none,) = machine.rdma_devices(demanded=True, root=tmp_path)
    assert (none.state, none.found) == ("fail", "the kernel lists none")
    root = put(tmp_path, {**ROCE, f"{PORT}/state": "1: DOWN"})
    (root / "dev/infiniband/uverbs0").unlink()
    findings = {f.item: f for f in machine.rdma_devices(demanded=True, root=root)}
    assert findings["mlx5_0 port 1"].state == "fail"
    assert (findings["RDMA access"].state, findings["RDMA access"].do) == ("fail", "modprobe ib_uverbs")


def test_huge_pages_and_governors(tmp_path: Path) -> None:
    """What the kernel was told, and what would be better."""
    root = put(
        tmp_path,
        {
            "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]",
            "proc/meminfo": "HugePages_Total:       5",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave",
        },
    )
    (pages,) = machine.huge_pages(root)
    assert (pages.state, "never" in pages.found, "reserved: 5" in pages.found) == ("warn", True, True)
    assert "echo madvise" in pages.do
    _, governor = machine.processors(root / "sys")
    assert (governor.state, governor.found) == ("warn", "governor powersave")


# -- clusters


def write_config(folder: Path, memory_nodes: int = 1, **settings: Any) -> ClusterConfig:
    folder.mkdir(exist_ok=True)
    return harness.write_config(folder, CHECKPOINT, harness.free_ports(memory_nodes), **settings)


def test_a_wrong_file_is_a_red_line(tmp_path: Path) -> None:
    """The machine is looked at all the same."""
    (tmp_path / "cluster.toml").write_text("[model]\n")
    facts = doctor(str(tmp_path / "cluster.toml"), status=1)

    assert line(facts, "cluster file")["state"] == "fail"
    assert "missing key" in line(facts, "cluster file")["found"]
    assert line(facts, "software")["state"] == "ok"


def test_nothing_runs_yet(tmp_path: Path) -> None:
    """Who is missing, how to start it, and what the model will need of the network."""
    config = write_config(tmp_path, 2)
    facts = doctor(str(config.file), status=1)

    for name, role, state in (("c0", "compute", "warn"), ("m0", "memory", "fail"), ("m1", "memory", "fail")):
        found = line(facts, f"node {name}")
        assert found["state"] == state
        assert f"{role} node at {config.find(name).address}: no process listens there" in found["found"]
        assert f"lamina node {config.file} --name {name}" in found["do"]
    assert facts["pairs"] == []
    assert re.search(r"[\d.]+ GB/s over all memory nodes, for batch 64", line(facts, "minimum bandwidth")["found"])


def test_memory_nodes_alone_are_measured_from_here(tmp_path: Path) -> None:
    """Before the first run of the compute node; too little bandwidth for the steps that are asked for is red."""
    config = write_config(tmp_path, 2, wiring=Wiring("tcp"))
    nodes = [harness.start_node(config, name) for name in ("m0", "m1")]
    with harness.running(*nodes):
        facts = doctor(str(config.file), "--step-ms", "0.001", status=1)
        for node in nodes:
            assert node.stop() == 0

    assert line(facts, "node c0")["state"] == "warn"
    assert line(facts, "node m0")["found"].endswith("waiting for a compute node")
    assert "µs" in line(facts, "this machine to m1 by tcp")["found"]
    assert [(p["compute"], p["memory"], p["transport"], p["error"]) for p in facts["pairs"]] == [
        ("", "m0", "tcp", ""),
        ("", "m1", "tcp", ""),
    ]
    for pair in facts["pairs"]:
        assert 1 < pair["p50_us"] <= pair["p99_us"] < 1e6
        assert 0.01 < pair["gb_per_s"] < 1000
    assert line(facts, "bandwidth to m0")["state"] == "fail"
    assert "its share of the minimum is" in line(facts, "bandwidth to m0")["found"]


def test_a_running_cluster_is_measured_by_its_compute_node(tmp_path: Path) -> None:
    """By each transport, while it decodes; the answers are not harmed, and rdma is only a remark without devices."""
    config = write_config(tmp_path, 2)
    nodes = [harness.start_node(config, n.name) for n in config.node]

    async def decode_beside() -> dict[str, Any]:
        await harness.ready(config, nodes[0])
        async with harness.client(config, peer_timeout=10) as client:
            alone = await client.generate([1, 2, 3], max_tokens=100)
            told = asyncio.create_task(asyncio.to_thread(doctor, str(config.file), status=0))
            while not told.done():
                assert (await client.generate([1, 2, 3], max_tokens=100)).tokens == alone.tokens
            return await told

    with harness.running(*nodes):
        facts = asyncio.run(decode_beside())
        for node in nodes:
            assert node.stop() == 0

    for name in ("c0", "m0", "m1"):
        assert line(facts, f"node {name}")["found"].endswith("ready")
    measured = {(p["compute"], p["memory"], p["transport"]) for p in facts["pairs"] if not p["error"]}
    assert {("c0", m, t) for m in ("m0", "m1") for t in ("shm", "tcp")} <= measured
    assert line(facts, "c0 to m1 by shm")["state"] == "ok"
    assert line(facts, "bandwidth to m1")["state"] == "ok"
    assert "by shm" in line(facts, "bandwidth to m1")["found"]
    if not any(Path("/sys/class/infiniband").glob("*")):
        assert line(facts, "c0 to m0 by rdma")["state"] == "none"


def test_strangers_and_others(tmp_path: Path) -> None:
    """Another secret, another role, something that is no node, and a port that never answers: each has its own line."""
    keys = [tmp_path / "ours.key", tmp_path / "theirs.key"]
    for key in keys:
        write_secret(key)
    config = write_config(tmp_path / "cluster", 4, wiring=Wiring("tcp", secret=keys[0]))
    port = {n.name: n.address.port for n in config.node}
    other = write_config(tmp_path / "other", wiring=Wiring("tcp", secret=keys[0]))
    text = other.file.read_text().replace(str(other.front.address), str(config.find("m2").address))
    other.file.write_text(text)
    nodes = [
        harness.start_memory(tmp_path, port["m0"], wiring=Wiring(secret=keys[1], kind="tcp")),
        harness.start_node(other, "c0"),
    ]
    with harness.running(*nodes), ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(("127.0.0.1", port["m1"])))
        assert silent.fileno() > 0
        asyncio.run(_until_listening(config.find("m0"), config.find("m2")))
        facts = doctor(str(config.file), status=1)

    assert line(facts, "node m0")["state"] == "fail"
    assert "reached by TCP, but" in line(facts, "node m0")["found"]
    assert line(facts, "node m0")["do"] == "give all nodes and this machine a copy of the same secret file"
    assert "no answer" in line(facts, "node m1")["found"]
    assert "firewall" in line(facts, "node m1")["do"]
    assert line(facts, "node m1")["state"] == "fail"
    assert line(facts, "node m2")["state"] == "fail"
    assert "a compute node answers, c0" in line(facts, "node m2")["found"]
    assert "no process listens there" in line(facts, "node m3")["found"]
    assert facts["pairs"] == []
    # One memory node per KV head at most, of which this model has four.
    assert line(facts, "minimum bandwidth")["state"] == "ok"


async def _until_listening(*nodes: Any) -> None:
    for node in nodes:

        async def listening(port: int = node.address.port) -> bool:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                return False
            writer.close()
            return True

        await harness.eventually(listening, 30)


# -- nodes and whoever measures


def test_only_nodes_of_the_file_are_probed(tmp_path: Path) -> None:
    """A compute node is no way to find out about other places."""
    config = write_config(tmp_path, wiring=Wiring("tcp"))
    nodes = [harness.start_node(config, n.name) for n in config.node]

    async def main() -> None:
        await harness.ready(config, nodes[0])
        hello, options = Hello("doctor", "test"), config.options()
        async with await connect(config.front.address, hello, options, deadline_s=10) as link:
            answers: asyncio.Queue[Probed] = asyncio.Queue()
            link.deliver(on_message=lambda plain: answers.put_nowait(decode(plain, Probed)))
            for name in ("m9", "c0", "tcp://127.0.0.1:22"):
                link.send(encode(Probe(node=name, kind="tcp")))
                assert f"c0 knows no memory node called {name!r}" in (await answers.get()).error
            link.send(encode(Probe(node="m0", kind="shm")))
            assert "demands" in (await answers.get()).error

    with harness.running(*nodes):
        asyncio.run(main())


def test_a_memory_node_bounds_what_it_echoes(tmp_path: Path) -> None:
    """So many at a time, so long, with one region of one size, and only for whoever reads what comes back."""
    config = write_config(tmp_path, wiring=Wiring("tcp"))
    (memory,) = config.memory_nodes
    node = harness.start_node(config, "m0")
    options = Options(kind="tcp")

    async def open_link() -> tuple[Link, asyncio.Event]:
        link, lost = await connect(memory.address, Hello(ROLE, "test"), options, deadline_s=30), asyncio.Event()
        link.deliver(on_lost=lambda _: lost.set())
        return link, lost

    async def main() -> None:
        assert (await measure(Sockets(), memory.address, "test", options)).bytes_per_s > 0
        links, lost = zip(*[await open_link() for _ in range(MAX_ECHOES + 1)], strict=True)
        async with asyncio.timeout(20):
            await lost[-1].wait()
            links[0].send(encode(EchoRegion(region=links[0].expose(Region("small", 4096)))))
            await lost[0].wait()
            region = Region("twice", 1 << 20)
            for _ in range(2):
                links[1].send(encode(EchoRegion(region=links[1].expose(region))))
            await lost[1].wait()
            assert not links[2].state.closed
            await lost[2].wait()  # after the time that a measurement may take
        assert (await measure(Sockets(), memory.address, "test", options)).bytes_per_s > 0

    with harness.running(node):
        asyncio.run(main())
        assert node.stop() == 0
