"""Make the front of a cluster: scheduler, engine, intake."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from random import Random
from typing import NamedTuple

from lamina.attention import KVLayout
from lamina.compute.shard_control import ShardControl
from lamina.compute.step import Steps
from lamina.config import ClusterConfig, RecoveryConfig
from lamina.errors import CapacityError, LaminaError, first_error
from lamina.front.blocks import BlockManager
from lamina.front.constraints import Constraints
from lamina.front.cost import CostModel
from lamina.front.engine import Engine
from lamina.front.fit import ANSWER_TOKENS, fit
from lamina.front.intake import Intake
from lamina.front.journal import RequestJournal
from lamina.front.members import Members
from lamina.front.prefix import PrefixKeys
from lamina.front.scheduler import Scheduler
from lamina.front.sequence import CacheChanges, ReservationRequest
from lamina.front.space import Space
from lamina.front.team import Formation, Team
from lamina.front.transfers import TransferAsker
from lamina.node.assemble import REMOTE_TOKENS
from lamina.node.model import BLOCK_TOKENS, ServedModel
from lamina.runtime.crossing import Crossing
from lamina.runtime.device import Device
from lamina.runtime.workers import ParallelWorkers
from lamina.transport import Address
from lamina.wire.admin import Status


class Front(NamedTuple):
    """Holds the front's side on each loop."""

    engine: Engine
    intake: Intake


def describe_front(status: Status, front: Front, served: ServedModel) -> None:
    """Put into a status what only the front knows."""
    counters = front.intake.counters
    status.steps = counters.steps
    status.requests_running = status.sequences = counters.running
    status.requests_waiting = counters.waiting
    status.tokens_generated = counters.tokens
    status.preemptions = counters.preemptions
    status.prompt_tokens = counters.prompt_tokens
    status.shared_tokens = counters.shared_tokens
    status.moves, status.failed_moves = counters.moves, counters.failed_moves
    status.moved_bytes = counters.moved_blocks * BLOCK_TOKENS * served.bytes_per_token
    status.redirections = counters.redirections
    status.requests_resumed = front.intake.meter.resumed
    status.kv_tokens_total = counters.blocks * BLOCK_TOKENS
    status.kv_tokens_free = counters.free_blocks * BLOCK_TOKENS


def describe_journal(status: Status, journal: RequestJournal, recovery: RecoveryConfig) -> None:
    """Put into a status how the front's journal is."""
    status.journal, status.journal_bytes = recovery.journal, journal.bytes
    status.journal_failure = "" if journal.failure is None else str(journal.failure)


def make_blocks(
    config: ClusterConfig, served: ServedModel, shards: Mapping[int, ShardControl], *, whole: bool
) -> BlockManager:
    """Make the block manager. If the cluster is ``whole``, raise CapacityError where the memory nodes cannot hold one
    request of the full context; else more may come."""
    layouts = {member: served.layout(shard.lane.layers) for member, shard in shards.items()}
    # Only the window that all layers have: where there are several, blocks of one kind can be in the way of another's.
    group, *others = next(iter(layouts.values())).groups
    blocks = BlockManager(
        {member: shard.capacity_tokens // BLOCK_TOKENS for member, shard in shards.items()},
        BLOCK_TOKENS,
        config.pipeline.partition,
        stripes=not served.knows_positions,
        window=None if others else group.window,
        moves=config.pipeline.moves and not served.knows_positions,
    )
    if whole and blocks.max_context < served.context:
        least = min(shards.values(), key=lambda shard: shard.capacity_tokens)
        raise CapacityError(
            f"the memory nodes can hold {blocks.max_context} tokens of one request, fewer than the context of "
            f"{served.context} ({least.name} holds the least of this model's KV cache, {least.capacity_tokens} tokens "
            f"of {layouts[least.member].bytes_per_token} bytes); give them more memory or set model.context lower"
        )
    return blocks


def make_scheduler(config: ClusterConfig, served: ServedModel, blocks: BlockManager) -> Scheduler:
    """Make the scheduler of this model over these blocks."""
    pipeline, facts = config.pipeline, served.facts
    kept = KVLayout(layers=facts.layers, dtype=facts.dtype, block_tokens=BLOCK_TOKENS)
    return Scheduler(
        batches=pipeline.batches,
        max_batch=pipeline.max_batch,
        prefill_tokens=pipeline.prefill_tokens,
        block_manager=blocks,
        prefix=PrefixKeys(
            model=facts.fingerprint,
            dtype=facts.dtype,
            kv_dtype=served.kv_dtype,
            block_tokens=BLOCK_TOKENS,
        ),
        remote_tokens=REMOTE_TOKENS,
        prefill_kv_tokens=pipeline.prefill_kv // kept.bytes_per_token,
        keep_chunks=served.schedule.is_settled,
        max_waiting=pipeline.max_waiting,
        cost=CostModel(compute_nodes=len(served.schedule.members)),
    )


async def open_front(
    config: ClusterConfig,
    name: str,
    served: ServedModel,
    members: Members,
    blocks: BlockManager,
    runner: Steps,
    device: Device,
    shards: Mapping[int, ShardControl],
    formation: Formation,
    home: Crossing,
    random: Random,
    constraints: Constraints,
    workers: ParallelWorkers,
    journal: RequestJournal | None,
    *,
    fits: bool,
) -> Front:
    """Make the engine of the node ``name``. With ``fits``, fit its cost model, while no request uses the nodes, and
    none may come or go; without, it learns from the steps of requests alone. Seeds come from ``random``.

    ``shards`` are the memory nodes that serve, by member id, at any time.
    """
    pipeline, there = config.pipeline, Crossing(device.loop)
    scheduler = make_scheduler(config, served, blocks)
    team = Team(runner, device, home, formation, member=members.id_of(name))
    intake = Intake(
        name,
        there,
        context=served.context,
        vocabulary=served.facts.vocabulary,
        stop_tokens=served.facts.stop_tokens,
        repetition_penalty=served.facts.repetition_penalty,
        max_waiting=pipeline.max_waiting,
        random=random,
        constraints=constraints,
        journal=journal,
    )
    transfers = TransferAsker(
        shards, lambda member: Address.parse(members.entry(member).address), random, intake.transferred
    )
    space = Space(shards, BLOCK_TOKENS, intake.reserved, transfers)
    if fits and served.context > ANSWER_TOKENS:
        try:
            await there.start(_fit(scheduler, team, space, device, home, config, served))
        except* LaminaError as group:
            raise first_error(group) from group
    engine = Engine(scheduler, team, home, intake, batches=pipeline.batches, workers=workers)
    intake.open(engine, space)
    return Front(engine, intake)


async def _fit(
    scheduler: Scheduler,
    team: Team,
    space: Space,
    device: Device,
    home: Crossing,
    config: ClusterConfig,
    served: ServedModel,
) -> None:
    """Fit the cost model, on the device's loop."""
    pipeline = config.pipeline

    async def reserve(request: ReservationRequest) -> int:
        return await home.start(space.hold(request))

    def release(sequence: int) -> None:
        team.forget([sequence])
        home.post(space.apply, CacheChanges(released=[sequence]))

    async with asyncio.TaskGroup() as tasks:  # if prompts cannot be sent, no step would ever end
        sending = tasks.create_task(team.send_prompts())
        await fit(
            scheduler,
            team.run,
            reserve,
            release,
            device.loop.time,
            slots=pipeline.batches,
            most_rows=min(pipeline.batches * pipeline.max_batch, pipeline.max_waiting),
            most_tokens=min(pipeline.prefill_tokens, served.context - ANSWER_TOKENS),
        )
        sending.cancel()
