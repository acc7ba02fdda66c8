"""Random clusters, random requests and random faults: every request ends as it would have without the faults.

    python -m tests.sim.chaos --seeds 1000 --kinds memory,network
    python -m tests.sim.chaos --seed 17 --kinds memory
    python -m tests.sim.chaos --mutants

A seed gives a `Case`, and a case always runs in the same way, to the byte of its trace. The model is `tests.sim.exact`,
so that tokens tell of every wrong key and value. A case that fails is made smaller while it still fails.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hashlib
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lamina.client import AsyncClient
from lamina.errors import CapacityError, ConnectError, DeadlockError, LaminaError, NodeError
from lamina.front import blocks, fit
from lamina.front.scheduler import Scheduler
from lamina.front.team import StepResult, Team
from lamina.sim.world import World
from lamina.wire.requests import Sampling
from tests.sim.cases import CONTEXT, HEADS, WITHIN_S, Ask, Case, Part, draw
from tests.sim.clusters import is_idle
from tests.sim.exact import Asking, exact_model, expected
from tests.sim.faults import KINDS, Fault, Troubled, kinds_of

STRIPE_BLOCKS = 1
"""Shorter than in a real cluster, so that short sequences are striped as well."""
READY_S = 10.0
"""Virtual seconds within which a cluster has to be ready where nothing is wrong."""
PROBE = Asking((1, 2, 3), 4, Sampling(seed=0))
TYPED = (NodeError, CapacityError, ConnectError)
"""What a request may fail with that cannot be answered."""

# -- runs


class Failure(AssertionError):
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
    virtual_s: float = 0.0
    trace: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()


def run(case: Case, *, tracing: bool = False) -> Outcome:
    """Run a case; Failure if anything is not as it has to be."""
    with _errors_noted() as noted, World(case.seed, model=case.link, tracing=tracing, limit_s=_limit_s(case)) as world:
        world.loop.set_exception_handler(lambda _, context: noted.append(_described(context)))
        chaos = _Run(case, world)
        try:
            with _small_scale(case), chaos.steps_timed():
                outcome = world.run(chaos.main())
        except DeadlockError as error:
            raise Failure("hang", str(error)) from error
        except LaminaError as error:
            raise Failure("error", repr(error)) from error
        outcome.trace = world.trace
    if noted:
        raise Failure("internal", "; ".join(noted[:3]))
    return outcome


def trace_of(case: Case) -> tuple[Failure | None, str]:
    """How a case fails, if it does, and a digest of all that happened in it."""
    failure = None
    with World(case.seed, model=case.link, limit_s=_limit_s(case)) as world:
        try:
            world.run(_Run(case, world).main())
        except (Failure, LaminaError) as error:
            failure = error
    return failure, hashlib.sha256("\n".join(world.trace).encode()).hexdigest()


def _limit_s(case: Case) -> float:
    return 3 * (case.trouble_s + case.work_s) + 1000.0


class _Run:
    """One run of a case."""

    def __init__(self, case: Case, world: World) -> None:
        self._case = case
        self._world = world
        self._loop = world.loop
        self._outcome = Outcome([Asked(ask) for ask in case.asks])
        self._strikes: list[float] = []
        self._lasting: list[Fault] = []
        """Those that have begun and not ended."""

    async def main(self) -> Outcome:
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
            after = await self._settled()
            if whole != after:
                raise Failure("leak", f"more than there was: {after - whole}; less: {whole - after}")
            self._count(await self._cluster.status(case.config.front.name))
            await self._stop()
        return self._outcome

    # -- requests

    async def _ask_all(self, begun_s: float) -> None:
        case, loop = self._case, self._loop
        due_s = begun_s + WITHIN_S + case.trouble_s + case.work_s
        clients = {ask.client for ask in case.asks}
        tasks = [loop.create_task(self._client(number, begun_s), name=f"client {number}") for number in clients]
        _, late = await asyncio.wait(tasks, timeout=due_s - loop.time()) if tasks else ((), ())
        if late:
            waiting = "; ".join(str(asked.ask) for asked in self._outcome.asked if not asked.ended_s)
            raise Failure("late", f"not ended {due_s - begun_s:.1f} s after the beginning: {waiting}")
        for task in tasks:
            task.result()
        wanted = expected([ask.asking for ask in case.asks], layers=case.layers, heads=HEADS)
        for asked, tokens in zip(self._outcome.asked, wanted, strict=True):
            self._check(asked, tokens)

    async def _client(self, number: int, begun_s: float) -> None:
        own = [asked for asked in self._outcome.asked if asked.ask.client == number]
        async with self._cluster.client() as client:
            await asyncio.gather(*(self._ask(client, asked, begun_s) for asked in own))

    async def _ask(self, client: AsyncClient, asked: Asked, begun_s: float) -> None:
        ask, loop = asked.ask, self._loop
        await asyncio.sleep(begun_s + ask.at_s - loop.time())
        asked.began_s = loop.time()
        sampling = {name: getattr(ask.asking.sampling, name) for name in Sampling.__struct_fields__}
        try:
            async with client.stream(
                ask.asking.prompt,
                max_tokens=ask.asking.tokens,
                priority=ask.priority,
                share_prefix=ask.shares,
                **sampling,
            ) as stream:
                async for token in stream:
                    if len(asked.tokens) == ask.leaves_after:
                        asked.left = True
                        break
                    asked.tokens.append(token.id)
        except LaminaError as error:
            asked.error = error
        asked.ended_s = loop.time()

    def _check(self, asked: Asked, tokens: list[int]) -> None:
        """See that a request has ended as it has to."""
        ask, got = asked.ask, asked.tokens
        if got != tokens[: len(got)]:
            first = next(i for i, (one, other) in enumerate(zip(got, tokens, strict=False)) if one != other)
            raise Failure("tokens", f"token {first} of {len(got)} is {got[first]} instead of {tokens[first]}: {ask}")
        under_way = any(asked.began_s <= strike_s <= asked.ended_s for strike_s in self._strikes)
        if asked.error is None:
            if not asked.left and len(got) != len(tokens):
                raise Failure("short", f"{len(got)} tokens instead of {len(tokens)}: {ask}")
            self._outcome.recovered += under_way and not asked.left
            return
        self._outcome.failed += 1
        if not self._case.loses:
            raise Failure("failed", f"{asked.error!r}: {ask}")
        if not isinstance(asked.error, TYPED):
            raise Failure("untyped", f"{asked.error!r}: {ask}")

    async def _probe(self) -> None:
        """See that a request is answered now."""
        async with self._cluster.client() as client:
            answer = await client.generate(PROBE.prompt, max_tokens=PROBE.tokens)
        (wanted,) = expected([PROBE], layers=self._case.layers, heads=HEADS)
        if answer.tokens != wanted:
            raise Failure("tokens", f"in the end the cluster says {answer.tokens} instead of {wanted}")

    # -- faults

    def _begin(self, fault: Fault) -> None:
        self._strikes.append(self._loop.time())
        self._outcome.struck[fault.kind] += 1
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
        while not (self._cluster.is_well and await self._is_ready()):
            if self._loop.time() > due_s:
                ended = {name: repr(error) for name, error in self._cluster.ended.items()}
                raise Failure("unwell", f"not ready within {within_s:.1f} s; ended: {ended or 'none'}")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.5)

    async def _is_ready(self) -> bool:
        try:
            async with asyncio.timeout(1.0):
                status = await self._cluster.status(self._case.config.front.name)
        except (LaminaError, TimeoutError):
            return False
        others = set(self._case.nodes.all) - {status.name}
        return status.state == "ready" and {peer.name for peer in status.peers} == others

    async def _settled(self) -> Counter[str]:
        """Wait until no block is in use anywhere; then count links and tasks."""
        due_s = self._loop.time() + READY_S
        while not await is_idle(self._cluster):
            if self._loop.time() > due_s:
                front, *memory = [await self._cluster.status(n.name) for n in (self._case.config.front, *self._memory)]
                told = [(s.name, s.sequences, s.kv_tokens_free, s.kv_tokens_total) for s in (front, *memory)]
                raise Failure("leak", f"of name, sequences, free and all tokens: {told}")
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
        """See that no node has ended by itself which had no reason."""
        if self._cluster.by_themselves and not self._case.loses:
            raise Failure("ended", f"{ {name: repr(e) for name, e in self._cluster.by_themselves.items()} }")
        if self._outcome.longest_step_s > self._case.most_step_s:
            raise Failure(
                "slow", f"a step took {self._outcome.longest_step_s:.3f} s, {self._case.most_step_s:.3f} are allowed"
            )

    async def _stop(self) -> None:
        self._cluster.end_supervision()
        ended = await self._cluster.stop_all()
        if any(ended.values()):
            raise Failure("stop", f"{ended}")
        await asyncio.sleep(0.01)
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        links = list(self._world.network.links)
        if tasks or links:
            raise Failure("leak", f"after all nodes have stopped: {tasks} {links}")

    def _count(self, front: Any) -> None:
        self._outcome.steps = front.steps
        self._outcome.preemptions = front.preemptions
        self._outcome.virtual_s = self._loop.time()

    @contextmanager
    def steps_timed(self) -> Iterator[None]:
        """Note how long the longest step takes, of those that come to an end."""
        outcome, loop, usual = self._outcome, self._loop, Team.run

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


@contextmanager
def _small_scale(case: Case) -> Iterator[None]:
    """Have the scheduler reserve, and the placement stripe, as a cluster does with longer sequences; and spend little
    on measuring steps whenever a front starts."""
    defaults: Any = Scheduler.__init__.__kwdefaults__
    usual = blocks.STRIPE_BLOCKS, defaults["ahead_blocks"], fit._rounds
    blocks.STRIPE_BLOCKS, defaults["ahead_blocks"] = STRIPE_BLOCKS, case.ahead_blocks
    fit._rounds = lambda rows, tokens: iter([(1, 1)])
    try:
        yield
    finally:
        blocks.STRIPE_BLOCKS, defaults["ahead_blocks"], fit._rounds = usual


def _described(context: dict[str, Any]) -> str:
    return f"{context.get('message')} {context.get('exception')!r}"


class _Errors(logging.Handler):
    """Notes errors that no part of the product expects: it logs them with a traceback."""

    def __init__(self, noted: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._noted = noted

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self._noted.append(f"{record.getMessage()} {record.exc_info[1]!r}")


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


# -- smaller cases


def shrink(case: Case, failure: Failure, part: Part) -> tuple[Part, Failure]:
    """Leave out faults, requests and nodes, one after the other, as long as a case fails in the same way."""

    def fails(smaller: Part) -> Failure | None:
        try:
            run(smaller.of(case))
        except ValueError:
            return None
        except Failure as found:
            return found if found.what == failure.what else None
        return None

    shrunk = True
    while shrunk:
        shrunk = False
        for smaller in part.smaller():
            if (found := fails(smaller)) is not None:
                part, failure, shrunk = smaller, found, True
                break
    return part, failure


# -- the command


@dataclass
class Total:
    """What came of many seeds."""

    seeds: int = 0
    asked: int = 0
    recovered: int = 0
    failed: int = 0
    left: int = 0
    steps: int = 0
    preemptions: int = 0
    virtual_s: float = 0.0
    struck: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        self.seeds += 1
        self.asked += len(outcome.asked)
        self.left += sum(asked.left for asked in outcome.asked)
        self.recovered += outcome.recovered
        self.failed += outcome.failed
        self.steps += outcome.steps
        self.preemptions += outcome.preemptions
        self.virtual_s += outcome.virtual_s
        self.struck += outcome.struck

    def __str__(self) -> str:
        struck = ", ".join(f"{kind} {count}" for kind, count in sorted(self.struck.items()))
        return (
            f"{self.seeds} seeds, {self.virtual_s:.0f} virtual seconds, {self.steps} steps, {self.preemptions} "
            f"preemptions; requests: {self.asked}, of which {self.recovered} were answered across a fault, {self.left} "
            f"left by their clients, {self.failed} failed as they may; faults: {struck or 'none'}"
        )


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def _tell(case: Case, part: Part, failure: Failure, command: str) -> None:
    """Say how a case fails, and how its smallest part does."""
    _say(f"\nseed {case.seed} fails: {failure}\n{case}\nagain: {command}")
    digests = [_digest(case) for _ in range(2)]
    _say(f"two traces: {digests[0]}, {'which are equal' if digests[0] == digests[1] else f'not {digests[1]}'}")
    small, smallest = shrink(case, failure, part)
    _say(f"the smallest part that fails so: {smallest}\n{small.of(case)}\nagain: {command} {small.options()}")


def _digest(case: Case) -> str:
    return trace_of(case)[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 1 if a seed fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=100, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, help="one alone")
    parser.add_argument("--kinds", default="", help=f"of faults, or groups of them: {', '.join(KINDS)}")
    parser.add_argument("--faults", help="the numbers of those to keep, or none")
    parser.add_argument("--asks", help="the numbers of the requests to keep, or none")
    parser.add_argument("--nodes", help="the names of those to keep")
    parser.add_argument("--keep-going", action="store_true", help="also behind a seed that fails")
    parser.add_argument("--show", action="store_true", help="print each case")
    parser.add_argument("--trace", action="store_true", help="print the trace of each run")
    options = parser.parse_args(arguments)
    try:
        kinds = kinds_of(options.kinds)
    except ValueError as error:
        parser.error(str(error))
    seeds = range(options.first, options.first + options.seeds) if options.seed is None else [options.seed]
    total, failed, begun_s = Total(), 0, time.perf_counter()
    gc.collect()
    gc.freeze()
    for seed in seeds:
        whole = draw(seed, kinds)
        part = Part.whole(whole)
        part = part._replace(
            faults=_numbers(options.faults, part.faults),
            asks=_numbers(options.asks, part.asks),
            nodes=tuple(options.nodes.split(",")) if options.nodes else part.nodes,
        )
        case = part.of(whole)
        if options.show:
            _say(f"seed {seed}\n{case}")
        try:
            outcome = run(case, tracing=options.trace)
        except Failure as failure:
            failed += 1
            command = f"python -m tests.sim.chaos --seed {seed}" + (f" --kinds {options.kinds}" if kinds else "")
            _tell(whole, part, failure, command)
            if not options.keep_going:
                break
            continue
        if options.trace:
            _say("\n".join(outcome.trace))
        total.add(outcome)
    seconds = time.perf_counter() - begun_s
    _say(f"{total}; {total.seeds / seconds:.2f} seeds/s" + (f"; {failed} FAILED" if failed else ""))
    return 1 if failed else 0


def _numbers(told: str | None, every: tuple[int, ...]) -> tuple[int, ...]:
    if told is None:
        return every
    return () if told == "none" else tuple(map(int, told.split(",")))


if __name__ == "__main__":
    sys.exit(main())
