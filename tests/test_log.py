"""Logs as JSON say what logs as logfmt say, with numbers as numbers; and how the format is chosen."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from typing import Any

import pytest

from lamina import log
from lamina.errors import ConfigError
from lamina.transport import Address


def written(message: Any, *arguments: object, error: BaseException | None = None) -> dict[str, Any]:
    """A record as JSON, without the clock."""
    info = (type(error), error, None) if error else None
    record = logging.LogRecord("lamina.front", logging.WARNING, "", 0, message, arguments, info)
    line = log._JsonLine("c0").format(record)
    assert "\n" not in line
    fields: dict[str, Any] = json.loads(line)
    assert fields.pop("ts").endswith("Z")
    assert (fields.pop("level"), fields.pop("node"), fields.pop("logger")) == ("warning", "c0", "lamina.front")
    return fields


@pytest.mark.parametrize(
    ("message", "arguments", "fields"),
    [
        ("event=ready", (), {"event": "ready"}),
        ("event=%s", ("stopping",), {"event": "stopping"}),
        ("event=x seconds=%.1f of=%d", (1.25, 3), {"event": "x", "seconds": 1.25, "of": 3}),
        ('event=x peer="%s" reason=%r', (Address.parse("::1".join("[]") + ":1"), 'a "b"\nc=d'), None),
        ("event=x reason='second signal'", (), {"event": "x", "reason": "second signal"}),
        ("event=x files=%r%s", ("a", " and 2 more"), {"event": "x", "files": "'a' and 2 more"}),
        ("event=x reason=%r; it goes on", ("no",), {"event": "x", "reason": "'no'; it goes on"}),
        ("nothing of ours: %s", ("100 %",), {"event": "message", "text": "nothing of ours: 100 %"}),
    ],
)
def test_a_line_of_json(message: str, arguments: tuple[object, ...], fields: dict[str, Any] | None) -> None:
    """One object, whatever the values hold."""
    expected = fields or {"event": "x", "peer": "tcp://[::1]:1", "reason": 'a "b"\nc=d'}
    assert written(message, *arguments) == expected


def test_an_exception_is_part_of_its_line() -> None:
    """Under the key that logfmt has for it; what an event says of a node does not hide whose log it is."""
    assert written("event=x node=%s", "m0", error=ValueError("no")) == {"event": "x", "error": "ValueError: no"}


def test_the_format_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the option, else the environment, else the file; another one is an error that names its place."""
    assert log.choose_format() == "logfmt"
    assert log.choose_format(configured="json") == "json"
    monkeypatch.setenv(log.FORMAT_VARIABLE, "logfmt")
    assert log.choose_format(configured="json") == "logfmt"
    assert log.choose_format("json") == "json"
    monkeypatch.setenv(log.FORMAT_VARIABLE, "xml")
    with pytest.raises(ConfigError, match="LAMINA_LOG_FORMAT: expected one of logfmt, json; got 'xml'"):
        log.choose_format()


def test_a_wrong_format_is_a_wrong_command_line() -> None:
    """The node does not start."""
    command = [sys.executable, "-P", "-m", "lamina", "node", "--role", "memory", "--log-format", "xml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, "lamina: --log-format: expected one of logfmt, json; got 'xml'\n")
