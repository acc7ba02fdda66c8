"""The cable between ``veth0`` (10.77.0.1, rxe0) and ``veth1`` (10.77.0.2, rxe1), and what can be wrong with it."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

ROCE_PORT = 4791  # of UDP


@contextlib.contextmanager
def disturbed(sender: str, *disturbance: str, roce_only: bool = False) -> Iterator[Callable[[], int]]:
    """Disturb what ``sender`` (veth0 or veth1) sends, in netem's words: ``disturbed("veth0", "loss", "3%")``.

    With ``roce_only``, all but RDMA passes undisturbed. Yields a function that counts the packets lost.
    """
    if roce_only:  # by a fourth band, which takes only what the filter sends there
        _tc("qdisc", "add", "dev", sender, "root", "handle", "1:", "prio", "bands", "4")
        _tc("qdisc", "add", "dev", sender, "parent", "1:4", "netem", *disturbance)
        roce = ("match", "ip", "protocol", "17", "0xff", "match", "ip", "dport", str(ROCE_PORT), "0xffff")
        _tc("filter", "add", "dev", sender, "parent", "1:", "protocol", "ip", "u32", *roce, "flowid", "1:4")
    else:
        _tc("qdisc", "add", "dev", sender, "root", "netem", *disturbance)

    def lost() -> int:
        disciplines: list[dict[str, Any]] = json.loads(_tc("-json", "-statistics", "qdisc", "show", "dev", sender))
        return sum(discipline["drops"] for discipline in disciplines if discipline["kind"] == "netem")

    try:
        yield lost
    finally:
        _tc("qdisc", "delete", "dev", sender, "root")


def _tc(*arguments: str) -> str:
    return subprocess.run(["/usr/sbin/tc", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout
