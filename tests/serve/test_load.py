"""500 clients stream for a while, and a fifth of their requests is dropped: nothing fails, and nothing is left behind.

``LAMINA_LOAD_SECONDS=300 python -m pytest tests/serve/test_load.py -m slow -rP`` runs it longer and shows the figures.
All that the clients do is in this process; how late its loop was is among the figures.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop
from transformers import AutoTokenizer

from lamina.bench.endpoint import percentile
from lamina.bench.http_streams import HttpAnswer, HttpConnection
from lamina.client import AsyncClient
from lamina.config import ClusterConfig, PipelineConfig
from lamina.wire.requests import JsonSchema, Regex
from tests import harness
from tests.serve.conftest import Server
from tests.serve.counted import MARK

CLIENTS = 500
SECONDS = float(os.environ.get("LAMINA_LOAD_SECONDS", "60"))
WARM_S = 15.0
"""The load before the state that the end is compared with."""
DROPPED = 0.2
ANSWER_S = 240.0
"""No answer takes so long, also on a machine that does other things."""
GROWTH = 24 << 20
"""How many bytes a process may have grown: allocators keep some memory, and caches of texts fill."""
BREAK = 1e-3
"""The two likeliest tokens of an answer always differ by more, as steps of other sizes are rounded in another way."""
BEGINNINGS = (
    "Once upon a time",
    "One day, a little girl",
    "The dog was",
    "There was a big tree",
    "Tom had a red ball",
    "In the garden",
    "Lily and her mom",
    "A bird sat on",
    "The sun was",
    "It was a rainy day",
    "Ben wanted to",
    "She found a box",
)
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "blue"]}, "old": {"type": "boolean"}},
    "required": ["colour", "old"],
    "additionalProperties": False,
}


@dataclass
class Case:
    """A request, and the text that each choice of its answer has to have."""

    kind: str
    path: str
    body: bytes
    text: str
    tokens: int
    reason: str
    choices: int = 1

    def check(self, answer: HttpAnswer) -> None:
        """Fail unless a stream is whole and right."""
        assert answer.complete, (self, answer)
        assert answer.events[-1] == b"data: [DONE]", answer
        texts, reasons = [""] * self.choices, [""] * self.choices
        usage = None
        for chunk in answer.chunks():
            assert "error" not in chunk, chunk
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                delta = choice.get("delta")
                texts[choice["index"]] += choice["text"] if delta is None else delta.get("content") or ""
                reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
        assert texts == [self.text] * self.choices, (self, texts)
        assert reasons == [self.reason] * self.choices, (self, reasons)
        assert usage is not None
        assert usage["completion_tokens"] == self.tokens * self.choices, (self, usage)


@dataclass
class Seen:
    """What the clients saw."""

    finished: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    busy: int = 0
    """How often a client was told to come again later."""
    tokens: int = 0
    first_s: list[float] = field(default_factory=list)
    next_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    """How late this loop was, looked at every 10 ms."""


class Load:
    """The clients."""

    def __init__(self, port: int, cases: list[Case], seconds: float, seed: int) -> None:
        self.seen = Seen()
        self._port = port
        self._cases = cases
        self._random = random.Random(seed)
        self._until = time.monotonic() + seconds

    async def run(self) -> None:
        """Ask until the time is over, and then wait for the last answers."""
        watching = asyncio.create_task(self._watch())
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._client())
        watching.cancel()

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + 0.01
            await asyncio.sleep(0.01)
            self.seen.late_s.append(loop.time() - due)

    async def _client(self) -> None:
        chance = self._random
        await asyncio.sleep(chance.random())
        connection = await HttpConnection.open(self._port)
        try:
            while time.monotonic() < self._until:
                if connection.closed or chance.random() < 0.3:
                    connection.transport.close()
                    connection = await HttpConnection.open(self._port)
                await self._ask(connection, chance.choice(self._cases))
        finally:
            connection.drop()

    async def _ask(self, connection: HttpConnection, case: Case) -> None:
        """Ask for an answer and check it, or leave before it is there."""
        if self._random.random() < DROPPED:
            await self._drop(connection, case)
            return
        connection.send(case.path, case.body)
        answer = await asyncio.wait_for(connection.end(), ANSWER_S)
        if answer.status == 429:
            self.seen.busy += 1
            await asyncio.sleep(int(answer.headers["retry-after"]) * self._random.uniform(1, 1.5))
            return
        assert answer.status == 200, (case, answer)
        case.check(answer)
        self._count(case, answer)

    def _count(self, case: Case, answer: HttpAnswer) -> None:
        seen = self.seen
        seen.finished[case.kind] += 1
        seen.tokens += case.tokens * case.choices
        if case.choices == 1:
            times = [at for event, at in zip(answer.events, answer.times, strict=True) if b'"text":"' in event]
            if times:
                seen.first_s.append(times[0] - answer.asked_s)
                seen.next_s += [later - before for before, later in itertools.pairwise(times)]

    async def _drop(self, connection: HttpConnection, case: Case) -> None:
        """Leave a request in one of many ways."""
        chance, transport = self._random, connection.transport
        how = chance.choice(("body", "at once", "before a token", "in an answer", "unread", "half", "same segment"))
        self.seen.dropped[how] += 1
        match how:
            case "body":  # a part of the request is all that ever comes
                connection.send_part(case.path, case.body, chance.randrange(1, len(case.body)))
                await asyncio.sleep(chance.random() * 0.2)
            case "at once":
                connection.send(case.path, case.body)
                await asyncio.sleep(0)
            case "before a token":
                connection.send(case.path, case.body)
                await asyncio.sleep(chance.random() * 0.1)
            case "in an answer":
                connection.send(case.path, case.body)
                await self._some_events(connection, case)
            case "unread":  # the server's writes stop in the middle of a chunk, once buffers are full
                connection.send(case.path, case.body)
                await self._some_events(connection, case)
                transport.pause_reading()
                await asyncio.sleep(chance.random())
            case "half":  # the server sees an end of what comes, and must not wait for more
                connection.send(case.path, case.body)
                await self._some_events(connection, case)
                transport.write_eof()
                await asyncio.wait_for(connection.end(), ANSWER_S)
            case "same segment":
                connection.send(case.path, case.body)
                transport.close()
        connection.drop()

    async def _some_events(self, connection: HttpConnection, case: Case) -> None:
        """Wait until a part of an answer has come, of any length."""
        count = self._random.randrange(1, case.tokens)
        async with asyncio.timeout(ANSWER_S):
            while len(connection.answer.events) < count and not connection.answer.complete:  # noqa: ASYNC110
                await asyncio.sleep(0.02)


async def make_cases(model: Path, client: AsyncClient) -> list[Case]:
    """Ask the Python client, one request at a time, for what the endpoint has to say."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    cases = []
    for number, beginning in enumerate(BEGINNINGS):
        for chats in (False, True):
            length = 12 + 5 * number
            ids: Any = beginning
            asked: dict[str, Any] = {"prompt": beginning}
            if chats:
                asked = {"messages": [{"role": "user", "content": beginning}]}
                ids = tokenizer.apply_chat_template(asked["messages"], add_generation_prompt=True)["input_ids"]
            cases += await _cases_of(client, "chat" if chats else "completion", ids, asked, length)
    assert len(cases) > 2 * len(BEGINNINGS), len(cases)
    return cases


async def _cases_of(client: AsyncClient, kind: str, ids: Any, asked: dict[str, Any], length: int) -> list[Case]:
    path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
    whole = await client.generate(ids, max_tokens=length, logprobs=2)
    assert whole.logprobs is not None
    if any(score.top[0][1] - score.top[1][1] < BREAK for score in whole.logprobs):
        return []

    def case(name: str, answer: Any, more: dict[str, Any], choices: int = 1) -> Case:
        body = asked | {"max_tokens": length, "temperature": 0, "stream": True, "n": choices} | more
        body["stream_options"] = {"include_usage": True}
        count = len(answer.tokens)
        return Case(
            f"{kind}, {name}", path, json.dumps(body).encode(), answer.text, count, answer.finish_reason, choices
        )

    cases = [case("plain", whole, {}), case("n=2", whole, {}, 2)]
    stop = whole.text[len(whole.text) // 2 :][:4]
    if len(stop) == 4:
        cases.append(case("stop", await client.generate(ids, max_tokens=length, stop=[stop]), {"stop": [stop]}))
    if length % 3 == 0:
        pattern = "[a-z]{2,8}( [a-z]{2,8}){1,4}\\."
        answer = await client.generate(ids, max_tokens=length, constraint=Regex(pattern))
        cases.append(case("regex", answer, {"structured_outputs": {"regex": pattern}}))
    if length % 3 == 1:
        answer = await client.generate(ids, max_tokens=length, constraint=JsonSchema(json.dumps(SCHEMA)))
        form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
        cases.append(case("schema", answer, {"response_format": form}))
    return cases


# -- processes, and what they hold


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    resident: int
    descriptors: int
    tasks: dict[str, int]


class Process:
    """A ``lamina`` command that can be asked for its tasks."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        command = [sys.executable, "-m", "tests.serve.counted", *arguments]
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, cwd=Path(__file__).parents[2])

    @property
    def pid(self) -> int:
        return self.process.pid

    def held(self) -> Held:
        lines = len(self._told())
        self.process.send_signal(signal.SIGUSR2)
        deadline = time.monotonic() + 10
        while len(told := self._told()) == lines:
            assert time.monotonic() < deadline, "the process does not tell of its tasks"
            time.sleep(0.01)
        status = Path(f"/proc/{self.pid}/status").read_text()
        resident = int(status.partition("VmRSS:")[2].split()[0]) << 10
        return Held(resident, len(os.listdir(f"/proc/{self.pid}/fd")), json.loads(told[-1]))

    def _told(self) -> list[str]:
        return [line.removeprefix(MARK) for line in self.log.read_text().splitlines() if line.startswith(MARK)]


@contextmanager
def ending(*processes: Process) -> Iterator[None]:
    """Leaves none of the processes behind; shows their logs when a test fails."""
    try:
        yield
    except BaseException:
        for process in processes:
            sys.stderr.write(f"--- {process.log}\n{process.log.read_text()[-5000:]}")
        raise
    finally:
        for process in processes:
            process.process.kill()
            process.process.wait()


async def idle(config: ClusterConfig) -> None:
    """Wait until the cluster has nothing to do and all its memory is free. What prompts share counts as free."""

    async def is_idle() -> bool:
        statuses = [await harness.status_of(config, node) for node in config.node]
        return all(
            (s.requests_running, s.requests_waiting, s.sequences) == (0, 0, 0) and s.kv_tokens_free == s.kv_tokens_total
            for s in statuses
        )

    await harness.eventually(is_idle, 30.0)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 900)
def test_clients_that_drop_harm_no_other_and_leave_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    """All other answers are complete and what the Python client gets. Afterwards the cluster is idle, and no process
    holds more than it did after a warm-up: neither memory nor descriptors nor tasks."""
    port, http = harness.free_ports(2)
    config = harness.write_config(
        tmp_path, checkpoint, [port], memory=256 << 20, pipeline=PipelineConfig(max_batch=640)
    )
    address = str(config.memory_nodes[0].address)
    memory = Process(
        tmp_path / "m0.log", *("node", "--role", "memory", "--listen", address, "--memory", "256MiB", "--threads", "1")
    )
    front = Process(tmp_path / "c0.log", "node", str(config.file), "--name", "c0")
    serve = Process(
        tmp_path / "serve.log",
        *("serve", str(config.file), "--port", str(http), "--files", str(tmp_path / "files")),
    )
    processes = {"serve": serve, "front": front, "memory": memory}
    with ending(*processes.values()):
        server = Server(serve.process, http, serve.log)
        server.ready()
        result = uvloop.run(_run(config, server, lambda: {name: p.held() for name, p in processes.items()}))
    before, after, metrics = result

    for name in processes:
        assert after[name].descriptors == before[name].descriptors, (name, before, after)
        assert after[name].tasks == before[name].tasks, name
        assert after[name].resident <= before[name].resident + GROWTH, (name, before, after)
        assert "Traceback" not in processes[name].log.read_text(), name
    assert "internal_error" not in serve.log.read_text()
    assert "lamina_http_requests_in_flight 1.0" in metrics  # the one that asks
    failed = [line for line in metrics.splitlines() if 'status="5' in line and 'endpoint="/ready"' not in line]
    assert failed == []


async def _run(
    config: ClusterConfig, server: Server, held: Callable[[], dict[str, Held]]
) -> tuple[dict[str, Held], dict[str, Held], str]:
    """Load the server twice; return what the processes hold before and after the second time, and its metrics."""
    async with harness.client(config, peer_timeout=30.0) as client:
        cases = await make_cases(config.model_path, client)
        await Load(server.port, cases, WARM_S, 1).run()
        await idle(config)
        await asyncio.sleep(1)
        before = held()
        load = Load(server.port, cases, SECONDS, 2)
        begun, own, generated = time.perf_counter(), time.process_time(), (await client.status()).tokens_generated
        await load.run()
        seconds, own = time.perf_counter() - begun, time.process_time() - own
        generated = (await client.status()).tokens_generated - generated
        await idle(config)
        await asyncio.sleep(1)
        after = held()
        # Whoever asks now gets what it would have got before.
        for case in cases:
            connection = await HttpConnection.open(server.port)
            case.check(await connection.ask(case.path, case.body))
            connection.drop()
    metrics = server.get("/metrics").body.decode()
    seen = load.seen
    finished, dropped = seen.finished.total(), seen.dropped.total()
    sys.stdout.write(
        f"{CLIENTS} clients for {seconds:.0f} s: {finished} answers complete, {dropped} dropped "
        f"({dropped / (finished + dropped):.0%}), {seen.busy} times told to wait\n"
        f"  finished: {dict(seen.finished)}\n  dropped: {dict(seen.dropped)}\n"
        f"  {seen.tokens / seconds:.0f} tokens/s in complete answers, {generated / seconds:.0f} in all\n"
        f"  first token: p50 {percentile(seen.first_s, 0.5) * 1e3:.0f} ms, "
        f"p99 {percentile(seen.first_s, 0.99) * 1e3:.0f}; "
        f"next: p50 {percentile(seen.next_s, 0.5) * 1e3:.1f} ms, p99 {percentile(seen.next_s, 0.99) * 1e3:.1f}\n"
        f"  this loop was late by p50 {percentile(seen.late_s, 0.5) * 1e3:.1f} ms, "
        f"p99 {percentile(seen.late_s, 0.99) * 1e3:.1f}, max {max(seen.late_s) * 1e3:.1f}; "
        f"it took {own / seconds:.2f} of a core\n"
    )
    for name in after:
        sys.stdout.write(
            f"  {name}: {before[name].resident / 2**20:.1f} -> {after[name].resident / 2**20:.1f} MiB, "
            f"{after[name].descriptors} descriptors, {sum(after[name].tasks.values())} tasks\n"
        )
    assert finished > 2 * len(cases)
    assert all(seen.finished[case.kind] for case in cases)
    return before, after, metrics
