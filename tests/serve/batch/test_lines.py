"""The input of a batch is indexed: what is wrong is named by line, and equal beginnings become neighbours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lamina.errors import ConfigError
from lamina.serve.batch.lines import MAX_LINE, read_input


def line(custom_id: str, prompt: Any = "text", **others: Any) -> bytes:
    whole = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt}}
    return json.dumps(whole | others).encode() + b"\n"


def write(folder: Path, *lines: bytes) -> Path:
    path = folder / "in.jsonl"
    path.write_bytes(b"".join(lines))
    return path


def test_equal_beginnings_become_neighbours(tmp_path: Path) -> None:
    """Requests are taken in an order in which those with the same beginning follow each other."""
    prompts = [f"{common} and then {number}" for number in range(10) for common in ("first", "second", "third")]
    found = read_input(write(tmp_path, *(line(str(i), prompt) for i, prompt in enumerate(prompts))))

    beginnings = [request.body["prompt"].split()[0] for _, request in found.read(found.places)]
    assert beginnings == ["first"] * 10 + ["second"] * 10 + ["third"] * 10


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{\n", "line 2 is no JSON"),
        (b"\xff\xfe\n", "line 2 is no JSON"),
        (b"[" * 100_000 + b"\n", "line 2 is no JSON"),
        (b"[]\n", "line 2: expected object, got []"),
        (b"{}\n", "line 2: missing key 'custom_id'"),
        (line("b", method="GET"), "line 2: method: expected \"POST\", got 'GET'"),
        (line("b", url="/v1/embeddings"), "line 2: url: expected one of /v1/chat/completions"),
        (line("b", body={"stream": True}), "line 2: body.stream: a batch does not stream"),
        (line("b", extra=1), "line 2: unknown key 'extra'"),
        (line("a"), "line 2: custom_id 'a' is that of line 1"),
    ],
)
def test_a_bad_line_is_named_and_harms_no_other(tmp_path: Path, text: bytes, reason: str) -> None:
    """What is wrong with a line is said, with its number, and the other lines stay."""
    found = read_input(write(tmp_path, line("a"), text, line("c")))

    assert [bad.number for bad in found.bad] == [2]
    assert found.bad[0].reason.startswith(reason)
    assert [request.custom_id for _, request in found.read(sorted(found.places))] == ["a", "c"]


def test_a_line_without_end_is_not_kept(tmp_path: Path) -> None:
    """A line that is too long is skipped as a whole; an empty one is no request; the last one needs no newline."""
    found = read_input(write(tmp_path, line("a"), b"x" * (3 * MAX_LINE) + b"\n", b"\n", line("c").rstrip()))

    assert [bad.reason for bad in found.bad] == [f"line 2 has {3 * MAX_LINE + 1} bytes; at most {MAX_LINE} are allowed"]
    assert [place.number for place in sorted(found.places)] == [1, 4]
    assert found.total == 3


def test_another_file_has_another_digest(tmp_path: Path) -> None:
    """One changed byte changes the digest."""
    first = read_input(write(tmp_path, line("a"))).digest
    assert read_input(write(tmp_path, line("a"))).digest == first
    assert read_input(write(tmp_path, line("b"))).digest != first


def test_an_empty_or_missing_file_is_an_error(tmp_path: Path) -> None:
    """There is nothing to answer."""
    with pytest.raises(ConfigError, match="no requests"):
        read_input(write(tmp_path, b"\n\n"))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_input(tmp_path / "nothing.jsonl")
