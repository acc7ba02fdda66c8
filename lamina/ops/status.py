"""``lamina status``: the state of every node of a cluster file."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from msgspec import to_builtins

from lamina.config import ClusterConfig, NodeConfig
from lamina.table import print_table
from lamina.watch import ClusterWatch
from lamina.wire.admin import Status


def run(config: ClusterConfig, *, as_json: bool) -> int:
    """Ask all nodes and print their states. Return the exit status, which is 0 only if all nodes are ready."""
    found = asyncio.run(_ask_all(config))
    if as_json:
        nodes = [_as_json(node, state) for node, state in zip(config.node, found, strict=True)]
        sys.stdout.write(json.dumps({"ready": _all_ready(found), "nodes": nodes}, indent=2) + "\n")
    else:
        headings = ("node", "role", "address", "state", "running", "waiting", "KV free", "KV tokens")
        rows = [_row(node, state) for node, state in zip(config.node, found, strict=True)]
        print_table(headings, rows, prose=("state",))
    return 0 if _all_ready(found) else 1


async def _ask_all(config: ClusterConfig) -> list[Status | str]:
    """Return each node's status, or why it does not answer."""
    async with ClusterWatch(config, name="status") as watch:
        return [view.status or view.reason for view in await watch.look()]


def _all_ready(found: list[Status | str]) -> bool:
    return all(isinstance(state, Status) and state.state == "ready" for state in found)


def _row(node: NodeConfig, state: Status | str) -> tuple[str | int | None, ...]:
    where = (node.name, node.role, str(node.address).removeprefix("tcp://"))
    if isinstance(state, str):
        return (*where, state)
    told = f"{state.state} for {state.waiting_for}" if state.waiting_for else state.state
    if state.journal_failure:
        told += "; the journal cannot be written"
    if node.role == "compute" and not state.kv_tokens_total:
        return (*where, told)  # only the front counts requests
    running = state.requests_running if node.role == "compute" else state.sequences
    waiting = state.requests_waiting if node.role == "compute" else None
    return (*where, told, running, waiting, state.kv_tokens_free, state.kv_tokens_total)


def _as_json(node: NodeConfig, state: Status | str) -> dict[str, Any]:
    known = {"name": node.name, "role": node.role, "address": str(node.address)}
    if isinstance(state, str):
        return known | {"state": "unreachable", "reason": state}
    counters: dict[str, Any] = to_builtins(state)
    del counters["type"]
    return counters | known
