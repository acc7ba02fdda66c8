"""When a node that has died is started again."""

from __future__ import annotations

from lamina.cluster.restarts import LIMIT, WITHIN_S, Restarts


def test_each_restart_comes_later_until_there_are_too_many() -> None:
    """Half a second, then twice as long each time; the sixth within ten minutes is one too many."""
    restarts = Restarts()

    assert [restarts.next_s(float(i)) for i in range(LIMIT)] == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert restarts.count == LIMIT
    assert restarts.next_s(WITHIN_S - 1) is None


def test_old_restarts_do_not_count() -> None:
    """A node that dies once an hour is started again for ever, at once."""
    restarts = Restarts()

    assert [restarts.next_s(3600.0 * i) for i in range(20)] == [0.5] * 20
    assert restarts.count == 1
