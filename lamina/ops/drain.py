"""``lamina drain``: let a memory node leave a cluster that goes on serving."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rich.console import Console

from lamina.admin import connect_to_front
from lamina.config import ClusterConfig
from lamina.errors import NodeError
from lamina.runtime.network import Network
from lamina.table import print_text

REACH_S = 4.0
"""How long the front may take to be reached."""
LOOK_S = 0.5
"""The seconds between two questions how far it is."""


def run(config: ClusterConfig, name: str, patience_s: float) -> None:
    """Have the front empty the memory node ``name`` and let it leave; return when it has left.

    Raises NodeError if the front has no such node, or cannot do it. An interrupt ends only the waiting.
    """
    console = Console(stderr=True, highlight=False)
    try:
        asyncio.run(drained(config, name, patience_s, lambda text: print_text(text, console)))
    except KeyboardInterrupt:
        print_text(f"{name} goes on leaving; `lamina status {config.file}` shows how far it is", console)
        raise


async def drained(
    config: ClusterConfig, name: str, patience_s: float, say: Callable[[str], None], *, network: Network | None = None
) -> None:
    """As `run`, over ``network``; ``say`` is told what there is to know meanwhile."""
    note, tokens = "", -1
    async with await connect_to_front(config, name="drain", deadline_s=REACH_S, network=network) as client:
        told = await client.drain(name, patience_s)
        while True:
            if told.error:
                raise NodeError(told.error, node=client.peer.name)
            if told.note != note:
                note = told.note
                say(note)
            if told.state == "gone":
                say(f"{name} has left the cluster and may be stopped; it comes back when it is started again")
                return
            if told.state == "back":
                say(f"{name} has left the cluster, and come back as it was started again")
                return
            if told.state == "lost":
                raise NodeError(f"{name} was lost before it was empty; what it held is computed anew", node=name)
            if told.tokens != tokens:
                tokens = told.tokens
                say(f"{name} still holds {tokens:,} tokens")
            await asyncio.sleep(LOOK_S)
            told = await client.drain(name, None)
