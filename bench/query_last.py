"""As ``filled``, with q sent after k and v have been computed, to measure what sending it first gains."""

from __future__ import annotations

import sys
from typing import Any

from lamina.bench.filled import main
from lamina.compute.shard import RemoteShard

_send_query, _send_key_value = RemoteShard.send_query, RemoteShard.send_key_value
_late: dict[tuple[RemoteShard, int], Any] = {}


def _keep(shard: RemoteShard, slot: int, *rest: Any) -> None:
    _late[shard, slot] = rest


def _send_both(shard: RemoteShard, slot: int, *rest: Any) -> None:
    _send_query(shard, slot, *_late.pop((shard, slot)))
    _send_key_value(shard, slot, *rest)


if __name__ == "__main__":
    for name, late in (("send_query", _keep), ("send_key_value", _send_both)):
        setattr(RemoteShard, name, late)
    sys.exit(main())
