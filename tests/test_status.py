"""What ``lamina status`` says of nodes, whatever they answer."""

from __future__ import annotations

import pytest

from lamina.config import ClusterConfig, ComputeNodeConfig, MemoryNodeConfig, ModelConfig
from lamina.ops import status
from lamina.transport import Address
from lamina.watch import LinkRates, NodeView, Rates, Watched
from lamina.wire.admin import MemberStatus, PeerStatus, Status, TenantStatus

CONFIG = ClusterConfig(
    model=ModelConfig(path="model"),
    node=[
        ComputeNodeConfig(name="compute0", address=Address("tcp", "127.0.0.1", 7070)),
        MemoryNodeConfig(name="memory-0", address=Address("tcp", "127.0.0.1", 7071), memory=1 << 30),
    ],
)
COMPUTE, MEMORY = (Watched(node.name, node.role, node.address) for node in CONFIG.node)
BUSY = Rates(
    tokens=123456.0, prompt_tokens=0, shared_tokens=0, steps=9.0, layers=123456.0, busy=1.0, links=list[LinkRates]()
)
LINK = PeerStatus(name="x", transport="rdma", choice="", kv_heads=1, bytes_sent=0, bytes_received=0)


def test_a_lease_is_told_with_the_time_that_is_left() -> None:
    """Of each tenant whose front is gone, and of no other."""
    tenants = [
        TenantStatus(
            name=name, model="", compute_nodes=[], sequences=0, kv_tokens_total=16, kv_tokens_free=16, quota=0,
            busy_s=0.0, lease_s=lease_s,
        )
        for name, lease_s in (("c0-11", 31.6), ("c0-22", None))
    ]  # fmt: skip
    view = NodeView(MEMORY, Status(name="memory-0", role="memory", state="ready", tenants=tenants))

    assert status._sentences([view]) == ["memory-0 keeps what c0-11 has there for 32 s without its front"]


def view_of_memory(state: str | None, member: str | None) -> NodeView:
    told = Status(name="memory-0", role="memory", state=state) if state else None  # type: ignore[arg-type]
    seen = member_of(MEMORY, member, 192.0) if member else None
    return NodeView(MEMORY, told, "" if told else "not running", member=seen)


def member_of(node: Watched, state: str, for_s: float) -> MemberStatus:
    return MemberStatus(name=node.name, state=state, for_s=for_s, role=node.role, address=str(node.address))  # type: ignore[arg-type]


def test_a_busy_cluster_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With long names, large numbers and several transports."""
    monkeypatch.setenv("COLUMNS", "80")
    views = [
        NodeView(
            node,
            Status(
                name=node.name, role=node.role, state="draining", requests_waiting=1024, sequences=64,
                kv_tokens_total=10**7, peers=[LINK],
            ),
            rates=BUSY,
            member=member_of(node, "serving", 86400 * 2 + 3600 * 3),
        )
        for node in (COMPUTE, MEMORY)
    ]  # fmt: skip
    status._print(CONFIG, views)

    head, _, _, front, memory = capsys.readouterr().out.splitlines()
    assert head.startswith("Lamina")
    assert front.split() == [
        "compute0", "compute", "draining", "2d03h", "100%", "64,", "1.02k", "wait", "rdma", "123k", "tokens/s",
    ]  # fmt: skip
    assert memory.endswith("123k layers/s")
    assert max(len(front), len(memory)) <= 80


@pytest.mark.parametrize(
    ("state", "member", "word", "ready", "sentence"),
    [
        ("ready", "serving", "ready", True, None),
        ("ready", None, "ready", True, None),
        ("ready", "lost", "ready", False, "memory-0 is ready, but lost to the front"),
        ("waiting", "lost", "waiting", False, "memory-0 is waiting, but lost to the front"),
        ("starting", "serving", "starting", False, None),
        (None, "lost", "lost", False, "memory-0, tcp://127.0.0.1:7071: not running"),
        (None, "serving", "unreachable", False, "memory-0, tcp://127.0.0.1:7071: not running"),
        (None, None, "unreachable", False, "memory-0, tcp://127.0.0.1:7071: not running"),
    ],
)
def test_the_word_for_a_node(
    state: str | None, member: str | None, word: str, ready: bool, sentence: str | None
) -> None:
    """What the node says counts, then what the front says; where the two differ, both are told."""
    view = view_of_memory(state, member)

    assert (view.word, view.is_ready) == (word, ready)
    assert status._sentences([view]) == ([sentence] if sentence else [])
    assert status._row(view)[3] == ("3m12s" if member else None)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.9, "0s"), (59.9, "59s"), (60, "1m00s"), (7500, "2h05m"), (86400 * 4 + 3600 * 3, "4d03h")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert status._lasting(seconds) == text
