"""Whatever is in a body, the answer is one that was meant: never an internal error."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.chat.request import ChatFields, read_chat
from lamina.errors import HttpError, RequestError
from lamina.serve.chat_completions import ChatBody
from lamina.serve.completions import CompletionBody, _prompts
from lamina.serve.parameters import constraint_of, convert, parse, request_of
from tests.serve.conftest import Server

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from([*ChatBody.__struct_encode_fields__, *CompletionBody.__struct_encode_fields__, "best_of", "a"])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_any_object_is_read_or_refused(plain: dict[str, Any]) -> None:
    """Without another error."""
    plain = {key: value for key, value in plain.items() if value is not None}
    try:
        body = parse({"prompt": "a"} | plain, CompletionBody)
        _prompts(body.prompt)
        request_of(
            body,
            [1],
            {},
            max_tokens=max(1, body.max_tokens or 1),
            logprobs=body.logprobs,
            prompt_logprobs=body.prompt_logprobs,
            constraint=constraint_of(body),
            show_special=False,
        )
    except HttpError as e:
        refused = e
    else:
        return

    assert refused.status == 400
    assert len(str(refused)) < 2000


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(ChatFields.__struct_encode_fields__), VALUES, max_size=4))
def test_any_chat_is_read_or_refused(plain: dict[str, Any]) -> None:
    """The same for what makes the prompt of a chat."""
    messages = [{"role": "user", "content": "a"}]
    with contextlib.suppress(HttpError, RequestError):
        read_chat(convert({"messages": messages} | plain, ChatFields))


def test_bodies_that_are_damaged_are_refused(server: Server) -> None:
    """Many of them, on one connection: with 200 or an error of the client's, and the server lives on."""
    chance = random.Random(5)
    bodies = [
        {"prompt": "Once", "max_tokens": 1, "stop": ["a"], "logit_bias": {"3": 1}, "n": 1},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "max_tokens": 1, "seed": 3},
    ]
    paths = ["/v1/completions", "/v1/chat/completions"]
    seen: dict[int, int] = {}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    for i in range(600):
        body = bytearray(json.dumps(bodies[i % 2]).encode())
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(body))
            match chance.randrange(3):
                case 0:
                    body[at] = chance.randrange(256)
                case 1:
                    del body[at : at + chance.randint(1, 8)]
                case 2:
                    body[at:at] = chance.choice([b'"', b"{", b"[", b",", b"\\", b"1e999", b"null", b"-1", b"\x00"])
            body = body or bytearray(b"x")
        connection.request("POST", paths[i % 2], bytes(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        seen[answer.status] = seen.get(answer.status, 0) + 1
    connection.close()

    assert set(seen) <= {200, 400, 404}, seen
    assert seen[400] > 300
    assert "internal_error" not in server.log.read_text()
    assert server.get("/ready").status == 200
