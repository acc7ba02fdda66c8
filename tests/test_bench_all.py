"""``lamina bench all``: every benchmark gets its turn, whatever becomes of those before it."""

from __future__ import annotations

import inspect

import pytest

from lamina.bench.cli import app, plot, run_each
from lamina.errors import ConfigError, LaminaError


def test_every_benchmark_can_be_run_with_its_defaults() -> None:
    """Nothing has to be given to any of them, and each has a quick form."""
    names = set()
    for command in app.registered_commands:
        assert command.callback
        if command.callback is plot:  # it draws what was measured
            continue
        parameters = inspect.signature(command.callback).parameters
        assert "quick" in parameters
        assert all(parameter.default is not inspect.Parameter.empty for parameter in parameters.values())
        names.add(command.name or command.callback.__name__)
    benchmarks = {
        "transport",
        "exchange",
        "simulate",
        "attention",
        "slices",
        "pipeline",
        "pool",
        "prefill",
        "decode",
        "drain",
        "throughput",
        "endpoint",
    }
    assert names == benchmarks | {"all"}


def test_one_that_fails_stops_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    """What it said is shown at once, and in the end who failed."""
    ran = []

    def good(quick: bool = False) -> None:
        ran.append(quick)

    def bad(quick: bool = False) -> None:
        raise ConfigError("this machine has one processor")

    def broken(quick: bool = False) -> None:
        raise ZeroDivisionError("division by zero")

    with pytest.raises(LaminaError, match="2 of 4 benchmarks failed: bad, broken"):
        run_each([good, bad, broken, good], quick=True)
    assert ran == [True, True]
    shown = capsys.readouterr().err
    assert "lamina bench bad: this machine has one processor" in shown
    assert "ZeroDivisionError" in shown

    run_each([good], quick=False)
    assert ran == [True, True, False]
