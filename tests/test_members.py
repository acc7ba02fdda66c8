"""The members of a cluster: stable ids, an epoch, one place that is told of changes."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from lamina.errors import ConfigError, NodeError
from lamina.front.members import Change, Members, State
from lamina.wire.codec import decode, encode
from lamina.wire.members import MemberEntry
from lamina.wire.orders import Membership

LOST = NodeError.lost("memory", "m0", "silent for 2 s")


ENTRIES = [
    MemberEntry(id_, name, role, address=f"tcp://127.0.0.1:{7000 + id_}")  # type: ignore[arg-type]
    for id_, (name, role) in enumerate((("c0", "compute"), ("c1", "compute"), ("m0", "memory"), ("m1", "memory")))
]


def _members() -> tuple[Members, list[Change]]:
    changes: list[Change] = []
    return Members(ENTRIES, changes.extend), changes


def test_ids_belong_to_names() -> None:
    """All nodes of a cluster have ids of their own, whatever their role."""
    members, _ = _members()

    assert [members.id_of(name) for name in ("c0", "c1", "m0", "m1")] == [0, 1, 2, 3]
    assert members.of_role("compute") == (0, 1)
    assert members.of_role("memory") == (2, 3)
    with pytest.raises(KeyError):
        members.id_of("m9")


def test_every_change_begins_an_epoch_and_is_told_once() -> None:
    """A second report of the same state changes nothing."""
    members, changes = _members()
    members.serve(2)
    members.lose(2, LOST)
    members.lose(2, NodeError.lost("memory", "m0", "found again by another"))
    members.leave(2)

    assert members.epoch == 2
    assert members.state(2) is State.LOST
    assert [(change.before, change.after) for change in changes] == [
        (State.JOINING, State.SERVING),
        (State.SERVING, State.LOST),
    ]
    assert changes[-1].error is LOST


def test_a_node_that_comes_back_has_its_id_again() -> None:
    """The others keep theirs meanwhile."""
    members, _ = _members()
    members.lose(2, LOST)
    assert members.of_role("memory") == (3,)

    members.serve(2)
    assert members.of_role("memory") == (2, 3)
    assert members.id_of("m0") == 2


def test_other_compute_nodes_take_over_what_the_front_says() -> None:
    """Over the wire: the epoch and every state, and the handler is told of what changed."""
    front, _ = _members()
    other, changes = _members()
    front.serve(0)
    front.lose(3, LOST)
    other.adopt(decode(encode(front.membership()), Membership))

    assert other.epoch == front.epoch == 2
    assert [other.state(id_) for id_ in range(4)] == ["serving", "joining", "joining", "lost"]
    assert [(change.entry.name, change.after) for change in changes] == [("c0", "serving"), ("m1", "lost")]
    assert str(changes[1].error) == "memory node m1 was lost: the front has lost it"


def test_a_loss_that_the_front_has_announced_is_handled_once() -> None:
    """What the node itself finds out later is no news, and neither is what the front says again."""
    front, _ = _members()
    other, changes = _members()
    front.lose(2, LOST)
    other.adopt(front.membership())
    other.lose(2, LOST)
    other.adopt(front.membership())

    assert [str(change.error) for change in changes] == ["memory node m0 was lost: the front has lost it"]


def test_another_file_is_refused() -> None:
    """A front for which this node is another one cannot be followed."""
    members, _ = _members()
    told = members.membership()
    wrong = Membership(epoch=1, members=[told.members[0], replace(told.members[1], name="c7"), *told.members[2:]])

    with pytest.raises(ConfigError, match=r"the front knows the nodes .*c7.*need the same file"):
        members.adopt(wrong, fixed=(0, 1))


def test_members_come_and_go() -> None:
    """The front decides who they are; the others take that over. An id is never given to another name."""
    front, _ = _members()
    other, _ = _members()
    assert front.free_id() == front.free_id(2) == 4
    assert front.free_id(7) == 7

    front.take_in(MemberEntry(4, "m9", "memory", address="tcp://127.0.0.1:7009"))
    front.serve(4)
    front.leave(3)
    front.part(3)
    front.forget(3)
    other.adopt(decode(encode(front.membership()), Membership), fixed=(0, 1))

    for members in (front, other):
        assert [entry.name for entry in members.entries] == ["c0", "c1", "m0", "m9"]
        assert members.in_state("memory", State.SERVING) == (4,)
        assert members.find("m1") is None
    assert front.state(3) is State.GONE
    assert front.has_left("m1")
    assert (front.free_id(), front.id_of("m1")) == (5, 3)
    assert other.epoch == front.epoch


def test_a_member_that_comes_back_at_another_address_keeps_its_id() -> None:
    """It is joining again, and its term begins anew."""
    members, _ = _members()
    members.join({2: 3})
    members.lose(2, LOST)
    before = members.epoch
    members.take_in(replace(ENTRIES[2], address="tcp://127.0.0.1:7010"))

    assert (members.state(2), members.term(2), members.epoch) == (State.JOINING, 0, before + 1)
    assert members.entry(2).address == "tcp://127.0.0.1:7010"
