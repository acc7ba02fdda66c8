"""What commands print reads well on a terminal of any width and in a pipe: nothing is cut, and nothing is missing."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from typing import Any

import pytest
import typer

from lamina.bench import (
    attention,
    decode,
    drain,
    exchange,
    pipeline,
    pool,
    prefill,
    report,
    simulate,
    slices,
    throughput,
    transport,
)
from lamina.bench.cli import app as bench_app
from lamina.cli import app
from lamina.demo.run import CHECKPOINT
from lamina.table import print_facts, print_table, print_text

LAMINA = [sys.executable, "-m", "lamina"]
STYLES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def in_pipe(*arguments: str) -> str:
    """Run a command whose output is a pipe, as a user who filters it does, and return what it printed."""
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    environment |= {"FORCE_COLOR": "1"}  # continuous integration sets this; a file must not get colours all the same
    done = subprocess.run([*LAMINA, *arguments], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def on_terminal(*arguments: str, columns: int = 80) -> list[str]:
    """Run a command on a pseudo-terminal of that width, and return the lines that it printed, without styles."""
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        environment.pop(name, None)
    near, far = pty.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    command = [*LAMINA, *arguments]
    with subprocess.Popen(command, stdin=far, stdout=far, stderr=subprocess.PIPE, env=environment) as process:
        os.close(far)
        pieces = []
        while piece := _read(near):
            pieces.append(piece)
        os.close(near)
        assert process.stderr
        assert process.wait(10) == 0, process.stderr.read().decode()
    return STYLES.sub("", b"".join(pieces).decode()).replace("\r\n", "\n").splitlines()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # what Linux says when the last process that held the terminal has ended
        return b""


def words(text: str) -> str:
    """Text without its line breaks."""
    return " ".join(text.split())


def is_whole(lines: list[str], columns: int = 80) -> None:
    """Assert that no line is cut, and that none is longer than the terminal is wide."""
    assert lines
    for line in lines:
        assert "…" not in line
        assert len(line) <= columns, line


# -- help


def commands() -> dict[str, Any]:
    """All commands by their arguments, as Typer builds them."""
    found: dict[str, Any] = {}
    for group, prefix in ((typer.main.get_command(app), ""), (typer.main.get_command(bench_app), "bench")):
        found[prefix] = group
        found |= {f"{prefix} {name}".strip(): command for name, command in group.commands.items()}  # type: ignore[attr-defined]
    return found


COMMANDS = commands()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_whole_at_80_columns(name: str) -> None:
    """Every option, its whole help and every command's whole description are there, and no line is too long."""
    command = COMMANDS[name]
    lines = on_terminal(*name.split(), "--help")

    is_whole(lines)
    shown = words("\n".join(lines))
    assert words(command.help) in shown
    for parameter in command.params:
        for option in (*parameter.opts, *parameter.secondary_opts):
            assert option in shown or parameter.param_type_name == "argument"
        assert words(parameter.help or "") in shown
    for sub_name, sub in getattr(command, "commands", {}).items():
        assert f"{sub_name} {words(sub.help)}" in shown


@pytest.mark.parametrize("arguments", [[], ["node"], ["bench"], ["bench", "throughput"]], ids="-".join)
def test_help_in_a_pipe_is_plain_text(arguments: list[str]) -> None:
    """A pipe gets the text of the terminal: no styles and no boxes."""
    shown = in_pipe(*arguments, "--help")

    assert shown.splitlines() == on_terminal(*arguments, "--help")
    assert shown.isascii()


# -- commands


@pytest.fixture(scope="module")
def converted() -> list[str]:
    """All values that `lamina convert` must print for the demo's checkpoint."""
    config = json.loads((CHECKPOINT / "config.json").read_text())
    layers = config["num_hidden_layers"]
    groups = ["0", f"1-{layers - 1}", str(layers), "all"]
    return [*groups, "2,361,600", "524,544", "492,032 each", "754,176", "512 B", "256 B", "961 KiB each"]


def test_convert_fits_80_columns(converted: list[str]) -> None:
    """The table of slices is a table: a line for each group of slices, under the headings."""
    lines = on_terminal("convert", str(CHECKPOINT))

    is_whole(lines)
    (headings,) = (line for line in lines if line.startswith("slices"))
    assert headings.split() == ["slices", "parameters", "weights", "carry", "q", "k", "v", "o"]
    for value in converted:
        assert any(value in line for line in lines)


@pytest.mark.slow
def test_convert_becomes_vertical_on_a_narrow_terminal(converted: list[str]) -> None:
    """With 50 columns every group is a block of lines, each with a name and a value."""
    lines = on_terminal("convert", str(CHECKPOINT), columns=50)

    is_whole(lines, 50)
    assert sum(line.startswith("slices:") for line in lines) == 4
    for value in converted:
        assert any(re.fullmatch(rf"\w+: +{re.escape(value)}", line) for line in lines), value


@pytest.fixture(scope="module")
def found() -> list[dict[str, str]]:
    """What `lamina doctor` finds on this machine."""
    findings: list[dict[str, str]] = json.loads(in_pipe("doctor", "--json"))["findings"]
    return findings


def test_doctor_fits_80_columns(found: list[dict[str, str]]) -> None:
    """Findings and advice are wrapped between words, or stand in blocks where a long word leaves no room."""
    lines = on_terminal("doctor")

    is_whole(lines)
    for item in (finding["item"] for finding in found):
        assert any(re.match(rf"(item: +)?{re.escape(item)}( |$)", line) for line in lines), item
    longest = max((word for finding in found for word in f"{finding['found']} {finding['do']}".split()), key=len)
    assert any(longest in line for line in lines)


def test_doctor_becomes_vertical_on_a_narrow_terminal(found: list[dict[str, str]]) -> None:
    """With 44 columns every finding is a block of lines; only a word that is longer, such as a path, sticks out."""
    lines = on_terminal("doctor", columns=44)

    assert all(len(line) <= 44 or " " not in line.removeprefix("what to do:").strip() for line in lines)
    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("item:")] == [f["item"] for f in found]
    shown = words("\n".join(lines))
    assert all(f"found: {words(finding['found'])}" in shown for finding in found)


def test_doctor_in_a_pipe_is_rows(found: list[dict[str, str]]) -> None:
    """The rows have the full names of the columns, and the same values as the JSON object."""
    *rows, summary = in_pipe("doctor").splitlines()

    assert re.fullmatch(r"\d+ fail, \d+ warn", summary)
    headings, *values = csv.reader(rows)
    assert headings == ["item", "state", "found", "what to do"]
    assert [row[0] for row in values] == [finding["item"] for finding in found]
    assert [row[1] for row in values] == [finding["state"] for finding in found]
    assert [row[3] for row in values] == [finding["do"] for finding in found]


@pytest.mark.slow
def test_the_demo_fits_80_columns() -> None:
    """The tables of `lamina demo` fit; its story is a stream, which the terminal breaks by itself."""
    lines = on_terminal("demo")

    tables = lines[next(i for i, line in enumerate(lines) if line.startswith("node ")) :]
    is_whole(tables)
    assert [line.split()[0] for line in tables[2:5]] == ["c0", "m0", "m1"]
    assert "bytes per token on the wire" in "\n".join(tables)
    assert tables[-1].endswith("identical: yes")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "benchmark", [["attention", "--backend", "torch", "--threads", "1"], ["exchange"]], ids=lambda b: b[0]
)
def test_a_benchmark_prints_all_its_figures(benchmark: list[str]) -> None:
    """On a terminal no line is cut, and in a pipe every row has as many values as there are headings."""
    is_whole(on_terminal("bench", *benchmark, "--quick"))

    printed = in_pipe("bench", *benchmark, "--quick")
    assert printed.isprintable() or not re.search("[…│┃━\x1b]", printed)
    for block in printed.strip().split("\n\n"):
        title, headings, *rows = block.splitlines()
        assert title
        if "," in headings:
            assert all(len(row) == len(next(csv.reader([headings]))) for row in csv.reader(rows))


# -- the tables of the benchmarks

BENCHMARKS: list[tuple[str, dict[str, str], dict[str, Any]]] = [
    *(
        (
            f"attention-{phase}",
            columns,
            {"backend": "llama.cpp", "kv": "bf16", "shape": "1x32768", "tokens_per_s": 12345.6},
        )
        for phase, columns in attention.COLUMNS.items()
    ),
    ("drain", drain.COLUMNS, {"mb_per_s": 1234.5, "bulk_mb_per_s": 12345.6}),
    ("pool", pool.COLUMNS, {"trace": "answers to 200K", "system": "one cluster", "tokens_per_s": 1234.5}),
    ("simulate", simulate.COLUMNS, {"clock": "timed", "compute": 8, "memory": 64}),
    ("exchange", exchange.COLUMNS, {"per_s": 12345.6, "round_trip_us": 123.4}),
    ("decode", decode.COLUMNS, {"tokens_per_s": 12345.6, "wire_bytes_per_token": 24576.0}),
    *(
        (f"pipeline-{i}", columns, {"load": "balanced, equal total", "batches": 4, "batch": 8.0, "context": 1024})
        for i, columns in enumerate((pipeline.STEPS, pipeline.OVERLAP))
    ),
    ("prefill", prefill.COLUMNS, {}),
    ("slices", slices.COLUMNS, {"gflops": 1234.5}),
    ("throughput", throughput.COLUMNS, {"shape": "32x2048", "system": "transformers", "tokens_per_s": 1234.5}),
    ("throughput-parts", throughput.PARTS, {"shape": "32x2048", "best_peer": "transformers"}),
    *(
        (f"transport-{phase}", columns, {"size": 8 << 20, "yardstick": "ib_write_lat", "depth": 16})
        for phase, columns in transport.COLUMNS.items()
    ),
]


@pytest.mark.parametrize(("columns", "row"), [b[1:] for b in BENCHMARKS], ids=[b[0] for b in BENCHMARKS])
def test_tables_of_benchmarks_fit_80_columns(
    columns: dict[str, str], row: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows as they are on real machines stay a table, so that they can be compared line by line; no name is double."""
    monkeypatch.setenv("COLUMNS", "80")
    report.print_table("title", [{key: row.get(key, 123.4) for key in columns}], columns)

    title, headings, rule, values, empty = capsys.readouterr().out.split("\n")[:5]
    assert (title, set(rule), empty) == ("title", {"-"}, "")
    assert len(values) <= 80
    assert all(heading in headings for heading in columns.values())
    assert len(set(columns.values())) == len(columns)


# -- the functions


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Print a table with a narrow and a wide column into a pipe of some width."""

    def show(columns: int) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        rows = [["short", 1_234_567, 0.123456], ["with, comma", None, 1234.5]]
        print_table(["name", "count", "a long heading"], rows, title="title")
        return capsys.readouterr().out.splitlines()

    return show


def test_a_table_that_fits_is_aligned(shown: Callable[[int], list[str]]) -> None:
    """Text stands left, numbers right, in groups of three digits."""
    assert shown(80) == [
        "title",
        "name             count  a long heading",
        "--------------------------------------",
        "short        1,234,567           0.123",
        "with, comma                      1,234",
    ]
    assert shown(38) == shown(80)


def test_a_table_that_does_not_fit_is_comma_separated(shown: Callable[[int], list[str]]) -> None:
    """With one column less than it needs, a table in a pipe has values that programs can read."""
    assert shown(37) == [
        "title",
        "name,count,a long heading",
        "short,1234567,0.123",
        '"with, comma",,1234',
    ]


def test_facts_without_a_value_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """The others are aligned; a value that looks like markup stays as it is."""
    print_facts({"a": 1, "longer": "[bold]x[/bold]", "none": None, "empty": ""})
    assert capsys.readouterr().out == "a:      1\nlonger: [bold]x[/bold]\n"


def test_a_sentence_in_a_pipe_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """However long it is, so that it can be searched for."""
    sentence = " ".join(["word"] * 100)
    print_text(sentence)
    assert capsys.readouterr().out == f"{sentence}\n"
