"""A hundred thousand requests of all kinds, most of them wrong: each gets an answer that was meant.

``LAMINA_FUZZ_REQUESTS`` is their number, ``LAMINA_FUZZ_SEED`` chooses others.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import uvloop

from lamina.bench.http_streams import HttpConnection
from lamina.config import ClusterConfig
from tests import harness
from tests.serve.conftest import serving
from tests.serve.test_attacks import resident

REQUESTS = int(os.environ.get("LAMINA_FUZZ_REQUESTS", "100000"))
SEED = int(os.environ.get("LAMINA_FUZZ_SEED", "1"))
CONNECTIONS = 24
MEANT = {200, 400, 401, 404, 405, 408, 411, 413, 415, 429, 431}
GROWTH = 150 << 20
"""How many bytes the server may grow: it keeps files, batches, compiled templates, and what allocators keep."""

SMALL: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": "Once", "max_tokens": 1},
        {"prompt": ["Once", "Tom"], "max_tokens": 1, "n": 2, "temperature": 0.5, "seed": 1},
        {"prompt": [5, 6, 7], "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}},
        {"prompt": [[5, 6], [7]], "max_tokens": 1, "echo": True, "logprobs": 2, "temperature": 0},
        {"prompt": "a", "max_tokens": 2, "stop": ["b", "c"], "logit_bias": {"3": 5}, "bad_words": ["x"]},
        {"prompt": "a", "max_tokens": 2, "structured_outputs": {"regex": "[ab]{2}"}, "prompt_logprobs": 1},
        {"prompt": "a", "max_tokens": 2, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "presence_penalty": 1},
    ],
    "/v1/chat/completions": [
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "max_tokens": 1, "stream": True},
        {
            "messages": [
                {"role": "system", "content": "b"},
                {"role": "assistant", "content": None, "tool_calls": []},
                {"role": "tool", "content": "1", "tool_call_id": "a"},
            ],
            "max_completion_tokens": 1,
            "logprobs": True,
            "top_logprobs": 2,
        },
        {
            "messages": [{"role": "user", "content": "a"}],
            "max_tokens": 2,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
            "tool_choice": "required",
        },
        {
            "messages": [{"role": "user", "content": "a"}],
            "max_tokens": 2,
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "boolean"}}},
        },
    ],
    "/v1/responses": [
        {"input": "a", "max_output_tokens": 1},
        {"input": [{"role": "user", "content": "a"}], "max_output_tokens": 1, "stream": True, "instructions": "b"},
        {
            "input": [{"type": "function_call_output", "call_id": "a", "output": "b"}],
            "text": {"format": {"type": "text"}},
        },
    ],
    "/tokenize": [{"prompt": "Once upon", "return_token_strs": True}],
    "/detokenize": [{"tokens": [4, 5, 6]}],
    "/v1/batches": [{"input_file_id": "file-1", "endpoint": "/v1/completions", "completion_window": "24h"}],
    "/v1/files": [{"file": "a"}],
}
PATHS = ("/", "/health", "/ready", "/version", "/metrics", "/docs", "/openapi.json", "/v1/models", "/v1/models/a%2fb")
ODD_PATHS = (
    "/v1/files?limit=0",
    "/v1/files?after=x&order=asc",
    "/v1/files/..%2f..%2fetc%2fpasswd",
    "/v1/files/x/content",
    "/v1/batches?limit=abc",
    "/v1/batches/x/cancel",
    "//",
    "/%00",
    "/%ff%fe",
    "/v1/completions/",
    "/v1/%63ompletions",
    "/static/../../x",
    "*",
    "/" + "a" * 5000,
)
METHODS = ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "POST")
KEYS = [key for bodies in SMALL.values() for body in bodies for key in body]
KEYS += ["best_of", "ignore_eos", "min_tokens", "priority", "salt", "cache_salt", "metadata", "user", "model", "store"]
KEYS += [
    "repetition_penalty",
    "frequency_penalty",
    "stop_token_ids",
    "add_special_tokens",
    "reasoning_effort",
    "include",
]
KEYS += [
    "chat_template_kwargs",
    "continue_final_message",
    "documents",
    "parallel_tool_calls",
    "reasoning",
    "truncation",
]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1e308, 10**30, 2**63, -(2**63), 2**31, "", "a", "\u0000", "\ud7ff",
    "🙂" * 20, "</s>", "<s>", "{{ x }}", "auto", "none", "required", [], {}, [[]], [None], [""], [0], [-1], [1536],
    {"a": {"b": []}}, {"type": "json_object"}, {"type": "object", "properties": {"a": {"$ref": "#"}}},
    [{"type": "text", "text": "a"}], [{"role": "user", "content": "a"}], {"json": {"type": "string"}}, "x" * 3000,
    {"regex": "(a|b)*"}, {"choice": ["a", "b"]}, {"grammar": "start: \"a\""}, {"regex": "("}, "NaN", [1, "a"],
]  # fmt: skip


class Fuzz:
    """Makes requests, the same for the same seed, and keeps count of what comes."""

    def __init__(self, port: int, requests: int, seed: int) -> None:
        self.seen: Counter[int] = Counter()
        self.broken: list[Any] = []
        self.closed = 0
        self._port = port
        self._left = requests
        self._random = random.Random(seed)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(CONNECTIONS):
                group.create_task(self._client())

    async def _client(self) -> None:
        connection = await HttpConnection.open(self._port)
        try:
            while self._left > 0:
                self._left -= 1
                if connection.closed:
                    connection = await HttpConnection.open(self._port)
                await self._ask(connection, *self._request())
        finally:
            connection.drop()

    async def _ask(self, connection: HttpConnection, method: str, path: str, body: bytes, kind: str) -> None:
        connection.send(path, body, method=method, kind=kind)
        answer = await asyncio.wait_for(connection.end(), 60)
        if answer.status == 0:  # the server closed the connection, which was idle, while the request was under way
            self.closed += 1
            return
        self.seen[answer.status] += 1
        told = (method, path, body[:500], kind, answer.status, answer.body[:500], answer.events[-1:])
        if not answer.complete:
            if not answer.events or b'"error"' not in answer.events[-1]:  # a stream that fails says why
                self.broken.append(told)
        elif answer.status not in MEANT:
            self.broken.append(told)
        elif answer.status >= 400 and method != "HEAD":
            error = json.loads(answer.body)["error"]
            if set(error) != {"message", "type", "param", "code"} or len(error["message"]) > 4000:
                self.broken.append(told)

    def _request(self) -> tuple[str, str, bytes, str]:
        chance = self._random
        draw = chance.random()
        if draw < 0.05:
            return chance.choice(METHODS), chance.choice(PATHS + ODD_PATHS + tuple(SMALL)), b"", "application/json"
        if draw < 0.08:
            return "POST", "/v1/files", *self._form()
        path = chance.choice(list(SMALL))
        plain = dict(chance.choice(SMALL[path]))
        for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
            self._mutate(plain)
        # Without a bound, an answer has the length of the context.
        for key in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if key in plain and (not isinstance(plain[key], int) or plain[key] > 3):
                plain[key] = chance.choice((1, -1, "1", 1.0))
        if path == "/v1/chat/completions" and not plain.keys() & {"max_tokens", "max_completion_tokens"}:
            plain["max_tokens"] = 1
        if path == "/v1/responses":
            plain.setdefault("max_output_tokens", 1)
        body = json.dumps(plain, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
        if chance.random() < 0.2:
            body = self._damaged(body)
        kind = (
            "application/json"
            if chance.random() < 0.98
            else chance.choice(("text/plain", "", "a/b;c=d", "multipart/form-data"))
        )
        return "POST", path, body, kind

    def _mutate(self, plain: dict[str, Any]) -> None:
        """Change a key, or a key somewhere inside."""
        chance = self._random
        inner = [value for value in plain.values() if isinstance(value, dict) and value]
        if inner and chance.random() < 0.3:
            target = dict(chance.choice(inner))
            for key, value in plain.items():
                if value == target:
                    plain[key] = target
            self._mutate(target)
            return
        match chance.randrange(4):
            case 0 if plain:
                del plain[chance.choice(list(plain))]
            case 1 if plain:
                plain[chance.choice(list(plain))] = chance.choice(VALUES)
            case 2:
                plain[chance.choice(KEYS)] = chance.choice(VALUES)
            case _:
                value: Any = chance.choice(VALUES)
                for _ in range(chance.choice((1, 2, 70))):
                    value = [value] if chance.random() < 0.5 else {"a": value}
                plain[chance.choice(KEYS)] = value

    def _damaged(self, body: bytes) -> bytes:
        chance, damaged = self._random, bytearray(body)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(damaged) or 1)
            match chance.randrange(3):
                case 0 if damaged:
                    damaged[at] = chance.randrange(256)
                case 1:
                    del damaged[at : at + chance.randint(1, 20)]
                case _:
                    damaged[at:at] = chance.choice(
                        [b'"', b"{", b"[", b",", b"\\", b"1e999", b"null", b"-", b"\x00", b"\xff"]
                    )
        return bytes(damaged)

    def _form(self) -> tuple[bytes, str]:
        chance = self._random
        part = b'--x\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
        line = json.dumps(
            {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}}
        ).encode()
        parts = [
            part % (b"purpose", b"", chance.choice((b"batch", b"x", b"user_data"))),
            part % (b"file", chance.choice((b'; filename="a"', b"", b'; filename="../../a"')), line),
        ]
        if chance.random() < 0.3:
            parts.append(part % (chance.choice((b"a", b"file", b"purpose", b"\xff")), b"", b"y" * 100))
        body = b"".join(parts) + b"--x--\r\n"
        return (self._damaged(body) if chance.random() < 0.5 else body), "multipart/form-data; boundary=x"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_requests_break_nothing(cluster: ClusterConfig, tmp_path: Path) -> None:
    """No internal error, no status that was not meant, no memory that stays; and the server is as good as before."""
    with serving(cluster, tmp_path / "serve.log", "--files", str(tmp_path / "files")) as server:
        server.ready()
        expected = server.complete(prompt="Once upon a time", max_tokens=20).json["choices"]
        uvloop.run(Fuzz(server.port, REQUESTS // 20, SEED + 1).run())
        before, begun = resident(server.process.pid), time.monotonic()
        fuzz = Fuzz(server.port, REQUESTS, SEED)
        uvloop.run(fuzz.run())
        after = resident(server.process.pid)
        _report(fuzz, time.monotonic() - begun, before, after)

        assert fuzz.broken == [], fuzz.broken[:5]
        assert fuzz.closed < REQUESTS // 100
        assert after - before < GROWTH
        assert fuzz.seen[200] > REQUESTS // 10
        assert fuzz.seen[400] > REQUESTS // 4
        written = server.log.read_text()
        for trouble in ("Traceback", "internal_error", "level=error", "Exception"):
            assert trouble not in written, written[written.index(trouble) - 500 :][:3000]
        asyncio.run(_idle(cluster))
        assert server.complete(prompt="Once upon a time", max_tokens=20).json["choices"] == expected


def _report(fuzz: Fuzz, seconds: float, before: int, after: int) -> None:
    sys.stdout.write(
        f"{REQUESTS} requests in {seconds:.0f} s: {dict(fuzz.seen)}; {before / 2**20:.0f} -> {after / 2**20:.0f} MiB\n"
    )


async def _idle(config: ClusterConfig) -> None:
    async def is_idle() -> bool:
        status = await harness.status_of(config, config.front)
        return status.requests_running + status.requests_waiting == 0

    await harness.eventually(is_idle, 30.0)
