"""What a program may ask for, and what it is told if it asks for something else."""

from __future__ import annotations

import array
import asyncio
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

import lamina
from lamina.chat.request import ChatFields
from lamina.client.settings import Settings, asked_for
from lamina.errors import ConfigError, ConnectError, RequestError, UsageError
from lamina.wire.requests import JsonSchema, Regex, Request, Sampling

NOWHERE = "tcp://127.0.0.1:1"


def request_for(prompt: Any, settings: Settings) -> Request:
    return asked_for(prompt, settings).request


@pytest.mark.parametrize(
    "prompt",
    [
        [1, 2, 3],
        (1, 2, 3),
        range(1, 4),
        np.array([1, 2, 3], np.uint16),
        [np.int64(1), np.int32(2), 3],
        torch.tensor([1, 2, 3]),
        [torch.tensor(1), 2, 3],
        array.array("q", [1, 2, 3]),
    ],
)
def test_token_ids_may_be_any_integers(prompt: Any) -> None:
    """They go as they are."""
    assert request_for(prompt, {}).prompt == [1, 2, 3]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "prompt: expected text or a sequence of token ids, got None"),
        (b"text", "prompt: expected text or token ids, got bytes; text in UTF-8 needs a decode() first"),
        (7, "prompt: expected text or a sequence of token ids, got int"),
        ({1, 2}, "prompt: expected text or a sequence of token ids, got set"),
        ({"input_ids": [1]}, "prompt: expected text or a sequence of token ids, got dict"),
        (["a", "b"], "prompt[0]: expected a token id, got 'a'"),
        ([1, 2.0], "prompt[1]: expected a token id, got 2.0"),
        ([1, True], "prompt[1]: expected a token id, got True"),
        ([1, None], "prompt[1]: expected a token id, got None"),
        ([1, -1], "prompt[1]: expected int >= 0, got -1"),
        ([1, 2**70], "prompt[1]: "),
        (np.array([1.5]), "prompt[0]: expected a token id, got 1.5"),
        (np.array([True]), "prompt[0]: expected a token id, got True"),
        (np.array(3), "prompt: expected text or a sequence of token ids, got ndarray"),
        (torch.tensor([[1, 2]]), "prompt[0]: expected a token id, got [1, 2]"),
        ("a\ud83d", r"prompt: '\ud83d' at position 1 is half of a surrogate pair and no character"),
    ],
)
def test_a_prompt_that_is_none_is_named(prompt: Any, message: str) -> None:
    """With the place, what was found, and what is expected."""
    with pytest.raises(RequestError) as caught:
        request_for(prompt, {})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temprature": 1.0}, "unknown setting 'temprature'; did you mean 'temperature'?"),
        ({"max_token": 1}, "unknown setting 'max_token'; did you mean 'max_tokens'?"),
        ({"xyz": 1}, "unknown setting 'xyz'; expected some of max_tokens, min_tokens, "),
        ({"temperature": None}, "temperature: expected float, got None"),
        ({"temperature": "1"}, "temperature: expected float, got '1'"),
        ({"max_tokens": 1.5}, "max_tokens: expected int, got 1.5"),
        ({"salt": "\udc80"}, r"salt: '\udc80' at position 0 is half of a surrogate pair"),
        ({"stop": ["a", "\udc80"]}, r"stop[1]: '\udc80' at position 0 is half of a surrogate pair"),
        ({"stop": ["a", ""]}, "stop[1]: expected str of length >= 1, got ''"),
        ({"stop": 3}, "stop: expected array, got 3"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids[1]: expected int >= 0, got -1"),
        ({"bad_words": "a"}, "bad_words: expected array, got 'a'"),
        ({"logit_bias": {5: 200}}, "logit_bias[...]: expected float <= 100.0, got {5: 200}"),
        ({"logprobs": 21}, "logprobs: expected int <= 20, got 21"),
        (
            {"constraint": "[a-z]+"},
            "constraint: expected JsonSchema, JsonObject, Regex, OneOf, Grammar, or a dict with a JSON schema, ",
        ),
        ({"constraint": Regex("")}, "constraint.pattern: expected str of length >= 1, got ''"),
        ({"constraint": {"enum": {1}}}, "constraint: this is no JSON schema, as it cannot be written as JSON: "),
        ({"deadline_s": 0}, "deadline_s: expected float > 0"),
        ({"deadline_s": "1"}, "deadline_s: expected float, got '1'"),
    ],
)
def test_a_setting_that_is_none_is_named(settings: Any, message: str) -> None:
    """Also one that is only misspelt."""
    with pytest.raises(RequestError) as caught:
        request_for("text", settings)
    assert message in str(caught.value)


def test_settings_are_those_of_a_request() -> None:
    """Each is declared once, and gets to the front; numbers of NumPy and torch count as numbers."""
    request = request_for("text", {"max_tokens": np.int64(3), "temperature": torch.tensor(0.5), "top_p": np.float32(1)})
    assert request == Request("text", 3, Sampling(temperature=0.5))

    fields = {*Request.__struct_fields__, *Sampling.__struct_fields__} - {"prompt", "chat", "sampling"}
    assert set(lamina.Settings.__annotations__) == fields | {"deadline_s"}
    for kind in (lamina.Client, lamina.AsyncClient):
        for method in (kind.stream, kind.generate, kind.generate_many, kind.branches):
            *_, settings = inspect.signature(method).parameters.values()
            assert (settings.kind, settings.annotation) == (settings.VAR_KEYWORD, "Unpack[Settings]")
        for method in (kind.chat, kind.chat_stream):
            *_, settings = inspect.signature(method).parameters.values()
            assert (settings.kind, settings.annotation) == (settings.VAR_KEYWORD, "Unpack[ChatSettings]")
    parts = {*ChatFields.__struct_fields__} - {"messages", "include_reasoning"}  # a client leaves it out itself
    assert set(lamina.ChatSettings.__annotations__) == set(lamina.Settings.__annotations__) | parts


def test_settings_may_be_what_a_program_has() -> None:
    """One text for several, arrays for lists, and a JSON schema as a dict."""
    request = request_for(
        "text",
        {
            "stop": "\n",
            "stop_token_ids": np.array([7, 8]),
            "bad_words": ("never", (1, np.int64(2))),
            "logit_bias": {np.int64(5): np.float32(2)},
            "constraint": {"type": "object"},
        },
    )
    assert (request.stop, request.stop_token_ids, request.bad_words) == (["\n"], [7, 8], ["never", [1, 2]])
    assert request.sampling.logit_bias == {5: 2.0}
    assert request.constraint == JsonSchema('{"type": "object"}')
    assert request_for("text", {"constraint": Regex("a+")}).constraint == Regex("a+")
    assert asked_for("text", {"deadline_s": 3}).deadline_s == 3.0


def test_a_type_checker_finds_a_misspelt_setting(tmp_path: Path) -> None:
    """As it finds a wrong type."""
    program = tmp_path / "program.py"
    program.write_text(
        "from collections.abc import Mapping, Sequence\n"
        "from typing import Any, TypedDict, Unpack\n"
        "Constraint = Any\n"
        f"{inspect.getsource(lamina.Settings)}\n"
        "def generate(prompt: str, **settings: Unpack[Settings]) -> None: ...\n"
        "generate('a', temperature=1.0, max_tokens=None)\n"
        "generate('a', temprature=1.0)\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert 'Unexpected keyword argument "temprature"' in done.stdout
    assert "Found 1 error" in done.stdout


# -- connecting


def connecting(**settings: Any) -> None:
    async def connect() -> None:
        async with lamina.connect(NOWHERE, deadline_s=0.01, **settings):
            pass

    asyncio.run(connect())


@pytest.mark.parametrize("as_text", [True, False])
def test_a_secret_may_lie_in_a_file(tmp_path: Path, as_text: bool) -> None:
    """A path is one as text too; a file that is not there is named."""
    path = tmp_path / "cluster.key"
    secret = str(path) if as_text else path
    with pytest.raises(ConfigError, match=r"cluster\.key cannot be read: No such file"):
        connecting(secret=secret)
    path.write_text("a secret of some bytes")
    path.chmod(0o600)
    with pytest.raises(ConnectError):
        connecting(secret=secret)


def test_what_cannot_be_connected_to_is_named() -> None:
    """By both clients."""
    with pytest.raises(ConfigError, match="secret: expected bytes, or the path of a file, got int"):
        connecting(secret=3)
    with pytest.raises(ConfigError, match=r'address: expected one like "tcp://127.0.0.1:7070", or several, got None'):
        lamina.Client(None)  # type: ignore[arg-type]
    with pytest.raises(ConnectError):
        lamina.Client(NOWHERE, deadline_s=0.01)


def test_a_connection_that_is_not_entered_says_how() -> None:
    """Whichever way it was used instead."""
    hint = r"connects in an `async with lamina\.connect\(\.\.\.\) as client:` block"

    async def awaited() -> None:
        await lamina.connect(NOWHERE)  # type: ignore[misc]

    with pytest.raises(UsageError, match=hint):
        asyncio.run(awaited())
    with pytest.raises(AttributeError, match=hint + "; it has no 'generate' itself"):
        lamina.connect(NOWHERE).generate("text")  # type: ignore[attr-defined]
    with (
        pytest.raises(UsageError, match=hint + r"; without asyncio, use `with lamina\.Client"),
        lamina.connect(NOWHERE),
    ):  # type: ignore[attr-defined]
        pass


def test_the_package_shows_what_is_public() -> None:
    """In a fresh interpreter too, where nothing of it is imported yet."""
    program = "import lamina, sys; print(sorted(set(lamina.__all__) - set(dir(lamina))), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[] False\n"
    assert get_type_hints(lamina.Settings)["temperature"] is float
