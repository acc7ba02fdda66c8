"""One run of a case of `tests.sim.cases`: all that happens in it, and what has to be true in the end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from lamina.client import AsyncClient
from lamina.errors import CapacityError, ConnectError, DeadlockError, LaminaError, NodeError
from lamina.front import blocks, fit, moves
from lamina.front.scheduler import Scheduler
from lamina.front.team import StepResult, Team
from lamina.memory import couriers
from lamina.sim.cluster import REACH_S
from lamina.sim.world import World
from lamina.wire.admin import Status
from lamina.wire.requests import Sampling
from tests.sim.cases import CONTEXT, HEADS, PATIENCE_S, WITHIN_S, Ask, Case
from tests.sim.exact import Asking, exact_model, expected
from tests.sim.faults import KINDS, Fault, Troubled

READY_S = 10.0
"""Virtual seconds within which a cluster has to be ready where nothing is wrong."""
REFUSED = re.compile("is still starting|takes no new requests|is not the front")
"""What a front says that takes no request now; its clients ask again."""
ASK_AGAIN_S = 0.1
PROBE = Asking((1, 2, 3), 4, Sampling(seed=0))
TYPED = (NodeError, CapacityError, ConnectError)
"""What a request may fail with that cannot be answered."""


class BrokenPromiseError(AssertionError):
    """What a run promised and did not keep: ``what`` in a word, and all about it."""

    def __init__(self, what: str, text: str) -> None:
        super().__init__(f"{what}: {text}")
        self.what = what


@dataclass
class Asked:
    """What became of a request."""

    ask: Ask
    tokens: list[int] = field(default_factory=list)
    error: LaminaError | None = None
    left: bool = False
    began_s: float = 0.0
    ended_s: float = 0.0


@dataclass
class Outcome:
    """What came of a run."""

    asked: list[Asked]
    struck: Counter[str] = field(default_factory=Counter)
    """How often each kind of fault began."""
    recovered: int = 0
    """Requests that were under way when a fault began, and were answered."""
    failed: int = 0
    steps: int = 0
    longest_step_s: float = 0.0
    preemptions: int = 0
    moves: int = 0
    redirections: int = 0
    virtual_s: float = 0.0
    trace: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()


def run(case: Case) -> Outcome:
    """Run a case; BrokenPromiseError if anything is not as it has to be."""
    outcome, failure = attempt(case)
    if failure is not None:
        raise failure
    return outcome


def attempt(case: Case, *, tracing: bool = False) -> tuple[Outcome, BrokenPromiseError | None]:
    """Run a case; what came of it, and what was not as it has to be."""
    failure: BrokenPromiseError | None = None
    with (
        _errors_noted() as noted,
        _small_scale(case),
        World(case.seed, model=case.link, tracing=tracing, limit_s=_limit_s(case)) as world,
    ):
        world.loop.set_exception_handler(lambda _, context: noted.append(_described(context)))
        chaos = _Run(case, world)
        try:
            with chaos.steps_timed():
                world.run(chaos.main())
        except BrokenPromiseError as error:
            failure = error
        except DeadlockError as error:
            failure = BrokenPromiseError("hang", str(error))
        except LaminaError as error:
            failure = BrokenPromiseError("error", repr(error))
        chaos.outcome.trace = world.trace
    if noted:
        inside = "; ".join(noted[:3])
        failure = (
            BrokenPromiseError("internal", inside)
            if failure is None
            else BrokenPromiseError(failure.what, f"{failure}; {inside}")
        )
    return chaos.outcome, failure


def _limit_s(case: Case) -> float:
    return 3 * (case.trouble_s + case.work_s) + 1000.0


class _Run:
    """One run of a case."""

    def __init__(self, case: Case, world: World) -> None:
        self._case = case
        self._world = world
        self._loop = world.loop
        self.outcome = Outcome([Asked(ask) for ask in case.asks])
        self._strikes: list[float] = []
        self._lasting: list[Fault] = []
        """Those that have begun and not ended."""

    async def main(self) -> None:
        case, loop = self._case, self._loop
        open_model = exact_model(layers=case.layers, heads=HEADS, context=CONTEXT)
        async with Troubled(self._world, case.config, open_model=open_model) as self._cluster:
            await self._until_well(READY_S)
            whole = await self._settled()
            begun_s = loop.time()
            for fault in case.faults:
                loop.call_at(begun_s + fault.at_s, self._begin, fault)
            await self._ask_all(begun_s)
            await self._heal(begun_s)
            await self._until_well(case.trouble_s + READY_S)
            self._check_nodes()
            await self._probe()
            await asyncio.sleep(case.forgotten_s)
            due_s = loop.time() + case.lost_s
            while (after := _without_given_up(await self._settled())) != _without_given_up(whole):
                if loop.time() > due_s:
                    raise BrokenPromiseError("leak", f"more than there was: {after - whole}; less: {whole - after}")
                await asyncio.sleep(0.1)
            self._count(await self._front())
            await self._stop()

    # -- requests

    async def _ask_all(self, begun_s: float) -> None:
        case, loop = self._case, self._loop
        due_s = begun_s + WITHIN_S + case.trouble_s + case.work_s + PATIENCE_S + REACH_S
        clients = {ask.client for ask in case.asks}
        tasks = [loop.create_task(self._client(number, begun_s), name=f"client {number}") for number in clients]
        _, late = await asyncio.wait(tasks, timeout=due_s - loop.time()) if tasks else ((), ())
        if late:
            waiting = "; ".join(str(asked.ask) for asked in self.outcome.asked if not asked.ended_s)
            raise BrokenPromiseError("late", f"not ended {due_s - begun_s:.1f} s after the beginning: {waiting}")
        for task in tasks:
            task.result()
        wanted = expected([ask.asking for ask in case.asks], layers=case.layers, heads=HEADS)
        for asked, tokens in zip(self.outcome.asked, wanted, strict=True):
            self._check(asked, tokens)

    async def _client(self, number: int, begun_s: float) -> None:
        own = [asked for asked in self.outcome.asked if asked.ask.client == number]
        try:
            async with self._cluster.client() as client:
                await asyncio.gather(*(self._ask(client, asked, begun_s) for asked in own))
        except ConnectError as error:  # no compute node was there in all that time
            for asked in own:
                asked.error, asked.ended_s = error, self._loop.time()

    async def _ask(self, client: AsyncClient, asked: Asked, begun_s: float) -> None:
        ask, loop = asked.ask, self._loop
        await asyncio.sleep(begun_s + ask.at_s - loop.time())
        asked.began_s = loop.time()
        sampling = {name: getattr(ask.asking.sampling, name) for name in Sampling.__struct_fields__}
        while not asked.ended_s:
            stream = client.stream(
                ask.asking.prompt,
                max_tokens=ask.asking.tokens,
                priority=ask.priority,
                share_prefix=ask.shares,
                **sampling,
            )
            try:
                async with stream:
                    async for token in stream:
                        if len(asked.tokens) == ask.leaves_after:
                            asked.left = True
                            break
                        asked.tokens.append(token.id)
            except LaminaError as error:
                if (
                    not asked.tokens
                    and REFUSED.search(str(error))
                    and loop.time() < asked.began_s + self._case.trouble_s + PATIENCE_S
                ):
                    await asyncio.sleep(ASK_AGAIN_S)
                    continue
                asked.error = error
            asked.ended_s = loop.time()

    def _check(self, asked: Asked, tokens: list[int]) -> None:
        """See that a request has ended as it has to."""
        ask, got = asked.ask, asked.tokens
        if got != tokens[: len(got)]:
            first = next(i for i, (one, other) in enumerate(zip(got, tokens, strict=False)) if one != other)
            raise BrokenPromiseError(
                "tokens", f"token {first} of {len(got)} is {got[first]} instead of {tokens[first]}: {ask}"
            )
        under_way = any(asked.began_s <= strike_s <= asked.ended_s for strike_s in self._strikes)
        if asked.error is None:
            if not asked.left and len(got) != len(tokens):
                raise BrokenPromiseError("short", f"{len(got)} tokens instead of {len(tokens)}: {ask}")
            self.outcome.recovered += under_way and not asked.left
            return
        self.outcome.failed += 1
        if not self._case.may_fail:
            raise BrokenPromiseError("failed", f"{asked.error!r}: {ask}")
        if not isinstance(asked.error, TYPED):
            raise BrokenPromiseError("untyped", f"{asked.error!r}: {ask}")

    async def _probe(self) -> None:
        """See that a request is answered now."""
        async with self._cluster.client() as client:
            answer = await client.generate(PROBE.prompt, max_tokens=PROBE.tokens)
        (wanted,) = expected([PROBE], layers=self._case.layers, heads=HEADS)
        if answer.tokens != wanted:
            raise BrokenPromiseError("tokens", f"in the end the cluster says {answer.tokens} instead of {wanted}")

    # -- faults

    def _begin(self, fault: Fault) -> None:
        self._strikes.append(self._loop.time())
        self.outcome.struck[fault.kind] += 1
        self._lasting.append(fault)
        KINDS[fault.kind].begin(self._cluster, fault.who)
        if fault.lasts_s is not None:
            self._loop.call_later(fault.lasts_s, self._end, fault)

    def _end(self, fault: Fault) -> None:
        if fault not in self._lasting:
            return
        self._lasting.remove(fault)
        KINDS[fault.kind].end(self._cluster, fault.who)

    async def _heal(self, begun_s: float) -> None:
        """Let all faults begin and end, also those that last for good."""
        last_s = max((fault.at_s + (fault.lasts_s or 0.0) for fault in self._case.faults), default=0.0)
        await asyncio.sleep(max(0.0, begun_s + last_s - self._loop.time()))
        await asyncio.sleep(0)
        for fault in list(self._lasting):
            self._end(fault)

    # -- the end

    async def _until_well(self, within_s: float) -> None:
        """Wait until all nodes run, and the front takes requests."""
        due_s, pause_s = self._loop.time() + within_s, 0.01
        while not (self._cluster.is_well and await self._is_ready() and self._cluster.is_well):
            if self._loop.time() > due_s:
                ended = {name: repr(error) for name, error in self._cluster.ended.items()}
                raise BrokenPromiseError(
                    "unwell", f"not ready within {within_s:.1f} s; ended: {ended or 'none'}; {await self._told()}"
                )
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.5)

    async def _told(self) -> str:
        """What the front says of the nodes."""
        try:
            status = await self._front()
        except LaminaError as error:
            return str(error)
        members = ", ".join(f"{member.name} {member.state}" for member in status.members)
        peers = ", ".join(peer.name for peer in status.peers)
        return f"the front is {status.state}, {status.waiting_for or 'waits for nobody'}; {members}; linked: {peers}"

    async def _front(self) -> Status:
        """What the front says, whichever compute node that is."""
        for name in self._case.nodes.compute:
            with contextlib.suppress(LaminaError):
                status = await self._cluster.status(name)
                if status.front == name:
                    return status
        raise NodeError("no compute node is the front", node=self._case.config.front.name)

    async def _is_ready(self) -> bool:
        try:
            async with asyncio.timeout(1.0):
                status = await self._front()
        except (LaminaError, TimeoutError):
            return False
        others = set(self._case.nodes.all) - {status.name}
        return status.state == "ready" and {peer.name for peer in status.peers} == others

    async def _settled(self) -> Counter[str]:
        """Wait until no block is in use anywhere; then count links and tasks."""
        due_s = self._loop.time() + READY_S
        while True:
            memory = [await self._cluster.status(node.name) for node in self._memory]
            told = [(s.name, s.sequences, s.kv_tokens_free, s.kv_tokens_total) for s in (await self._front(), *memory)]
            if all(sequences == 0 and free == total > 0 for _, sequences, free, total in told):
                break
            if self._loop.time() > due_s:
                raise BrokenPromiseError("leak", f"of name, sequences, free and all tokens: {told}")
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        found = Counter(f"link {link.info.local.name}>{link.info.peer.name}" for link in self._world.network.links)
        found.update(f"task {task.get_coro().__qualname__}" for task in asyncio.all_tasks())
        for name, node in self._cluster.nodes.items():
            if (runner := getattr(node, "_runner", None)) is not None:
                found[f"prompts on {name}"] += len(runner.prompts)
        return found

    @property
    def _memory(self) -> list[Any]:
        return list(self._case.config.memory_nodes)

    def _check_nodes(self) -> None:
        """See that no node has ended by itself, but for a front that could not start again yet, or that was not the
        front any more."""
        may_end = set(self._case.nodes.compute) if self._case.loses_front else set()
        ended = {name: error for name, error in self._cluster.by_themselves.items() if name not in may_end}
        if ended:
            raise BrokenPromiseError("ended", f"{ {name: repr(error) for name, error in ended.items()} }")
        if self.outcome.longest_step_s > self._case.most_step_s:
            raise BrokenPromiseError(
                "slow", f"a step took {self.outcome.longest_step_s:.3f} s, {self._case.most_step_s:.3f} are allowed"
            )

    async def _stop(self) -> None:
        self._cluster.end_supervision()
        await self._cluster.stop_all()
        ended = {node.name: self._cluster.ended[node.name] for node in self._case.config.node}
        if any(ended.values()):
            raise BrokenPromiseError("stop", f"{ended}")
        await asyncio.sleep(0.01)
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        links = list(self._world.network.links)
        if tasks or links:
            raise BrokenPromiseError("leak", f"after all nodes have stopped: {tasks} {links}")

    def _count(self, front: Any) -> None:
        self.outcome.steps = front.steps
        self.outcome.preemptions = front.preemptions
        self.outcome.moves = front.moves
        self.outcome.redirections = front.redirections
        self.outcome.virtual_s = self._loop.time()

    @contextmanager
    def steps_timed(self) -> Iterator[None]:
        """Note how long the longest step takes, of those that come to an end."""
        outcome, loop, usual = self.outcome, self._loop, Team.run

        async def timed(team: Team, slot: int, number: int, step: Any) -> StepResult:
            begun_s = loop.time()
            try:
                return await usual(team, slot, number, step)
            finally:
                outcome.longest_step_s = max(outcome.longest_step_s, loop.time() - begun_s)

        Team.run = timed  # type: ignore[method-assign]
        try:
            yield
        finally:
            Team.run = usual  # type: ignore[method-assign]


def _without_given_up(found: Counter[str]) -> Counter[str]:
    """All but the steps that the front has given up, which stay on other compute nodes until the next of their slot."""
    return Counter(
        {what: n for what, n in found.items() if what not in ("task Follower._watch", "task StepRunner.run")}
    )


@contextmanager
def _small_scale(case: Case) -> Iterator[None]:
    """Have the scheduler reserve, the placement stripe, and sequences move, as in a cluster with longer sequences; and
    spend little on measuring steps whenever a front starts."""
    defaults: Any = Scheduler.__init__.__kwdefaults__
    with (
        mock.patch.object(blocks, "STRIPE_BLOCKS", 1),
        mock.patch.multiple(moves, PLAN_EVERY=2, MIN_LEFT=4),
        mock.patch.object(couriers, "IDLE_S", 0.1),
        mock.patch.object(fit, "_rounds", return_value=[(1, 1)]),
        mock.patch.dict(defaults, ahead_blocks=case.ahead_blocks),
    ):
        yield


def _described(context: dict[str, Any]) -> str:
    task = context.get("task")
    name = f" {task.get_coro().__qualname__}" if task is not None else ""
    return f"{context.get('message')}{name} {_where(context.get('exception'))}"


def _where(error: BaseException | None) -> str:
    """An error, and where it was raised."""
    places = []
    for inner in _innermost(error):
        frames = traceback.extract_tb(inner.__traceback__)[-4:]
        places.append(f"{inner!r} in " + " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames)))
    return "; ".join(places) or repr(error)


def _innermost(error: BaseException | None) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _innermost(inner)
    elif error is not None:
        yield error


class _Errors(logging.Handler):
    """Notes errors that no part of the product expects: it logs them with a traceback."""

    def __init__(self, noted: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._noted = noted

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self._noted.append(f"{record.getMessage()} {_where(record.exc_info[1])}")


@contextmanager
def _errors_noted() -> Iterator[list[str]]:
    noted: list[str] = []
    log, handler = logging.getLogger("lamina"), _Errors(noted)
    log.addHandler(handler)
    propagates, log.propagate = log.propagate, False
    try:
        yield noted
    finally:
        log.removeHandler(handler)
        log.propagate = propagates
