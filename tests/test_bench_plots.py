"""Pictures of results: what a reader can take from them, and what is refused before anything is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from matplotlib.figure import Figure

from lamina.bench import plots, report
from lamina.bench.report import Result, Row
from lamina.errors import ConfigError

MACHINE = {"cpu": "AMD EPYC", "cores": 2, "python": "3.11.7"}


def decode(batch: int, tokens_per_s: float, *runs: float) -> Row:
    parts = {f"layer_{part}_us": 10.0 * batch for part in ("compute", "attention", "wire")}
    own = {"batch": batch, "tokens_per_s": tokens_per_s, "runs": list(runs or (tokens_per_s,))}
    return {**own, "transformers_tokens_per_s": 100.0, "transformers_runs": [100.0], **parts}


def transport(name: str, phase: str, size: int, yardstick: str | None) -> Row:
    row = {"phase": phase, "transport": name, "size": size, "depth": 1, "p50_us": 0.4 * size, "gbps": 0.006 * size}
    return {**row, "yardstick": yardstick, "yardstick_p50_us": 0.1 * size, "yardstick_gbps": 0.01 * size}


def throughput(system: str, *rates: float) -> Row:
    turns = [{"tokens_per_s": rate} for rate in rates]
    about = {"model": "M", "batch": 8, "context": 4096, "failed": None}
    return {**about, "system": system, "tokens_per_s": sorted(rates)[len(rates) // 2], "rounds": turns}


ROWS: dict[str, list[Row]] = {
    "decode": [decode(1, 20.0, 18.0, 20.0, 25.0), decode(16, 200.0)],
    "transport": [
        transport(name, phase, size, beside)
        for name, beside in (("tcp", "socket"), ("shm", None))
        for phase in ("round_trip", "bandwidth")
        for size in (64, 8192, 2 << 20)
    ],
    "throughput": [throughput("lamina", 60.0, 61.0, 68.0), throughput("vllm", 46.0, 41.0, 47.0)],
    "attention": [
        {
            "phase": "decode",
            "backend": name,
            "kv_dtype": "bfloat16",
            "batch": batch,
            "context": context,
            "gqa": 4,
            "head_dim": 128,
            "threads": 2,
            "ratio": ratio,
        }
        for name, ratio in (("native", 0.6), ("sdpa", 0.02))
        for batch, context in ((16, 512), (16, 2048), (1, 32768))
    ],
    "slices": [
        {"model": "M", "part": "slices", "batch": n, "read_ratio": 0.9, "peak_ratio": 0.1, "products_ratio": 1.1}
        for n in (1, 8)
    ],
    "exchange": [{"cores": 2, "batch": 1, "batches": n, "exchange_us": 90.0, "round_trip_us": 5.0} for n in (1, 2)],
    "simulate": [{"clock": c, "compute": 1, "memory": 4, "steps_per_s": 160.0} for c in ("null", "timed")],
    "endpoint": [
        {"system": name, "failed": "", "rounds": [{"tokens_per_s": 5000.0}, {"tokens_per_s": 5200.0}]}
        for name in ("Python client", "lamina serve")
    ],
    "drain": [{"transport": kind, "p99_ms": 20.0, "drained_p99_ms": 28.0} for kind in ("shm", "tcp")],
    "pool": [
        {"trace": "answers to 60K", "system": system, "ratio": ratio}
        for system, ratio in (("isolated", 1.0), ("one cluster", 1.1), ("with moves", 1.3))
    ],
    "prefill": [{"prefill_tokens": n, "alone_ms": 20.0, "beside_ms": 40.0, "bound_ms": 60.0} for n in (128, 512)],
    "pipeline": [
        {"load": "balanced", "batches": n, "step_ms": 50.0, "compute_ms": 20.0, "attention_ms": 20.0, "wire_ms": 9.0}
        for n in (1, 2)
    ],
}
BLOCKS: list[list[Any]] = [
    ["compute", "head", 0, 3, 0.0, 2.0],
    ["memory", "past", 1, 7, 1.0, 4.0],
    ["compute", "sample", 0, -1, 4.0, 5.0],
]


def result(bench: Any, rows: list[Row] | None = None) -> Result:
    timeline = BLOCKS if bench == "pipeline" else []
    return Result(bench, "links over shm", rows or ROWS[bench], MACHINE, timeline)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn, which are rendered all the same."""
    drawn: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *arguments: Any, **options: Any) -> None:
        drawn.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return drawn


def texts(axes: Any) -> list[str]:
    """What stands at the ticks of both axes."""
    return [label.get_text() for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels()]


@pytest.mark.parametrize("bench", list(report.TITLES))
def test_every_result_that_a_run_prints_can_be_drawn(
    bench: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], figures: list[Figure]
) -> None:
    """From the file of a --json run; the picture names what, the conditions and the machine, axes and series in words,
    and shows plain numbers."""
    report.print_json(result(bench))
    file, out = tmp_path / "run.json", tmp_path / "picture.png"
    file.write_text(capsys.readouterr().out)

    plots.draw(out, report.read([file]))

    assert out.read_bytes().startswith(b"\x89PNG")
    [figure] = figures
    heading = figure.get_suptitle()
    for part in (report.TITLES[bench], "links over shm", "AMD EPYC, 2 cores, Python 3.11.7"):
        assert part in heading.replace("\n", " ")
    [legend] = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels
    assert len(labels) == len(set(labels))
    for axes in figure.axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert axes.get_title(loc="left")
        assert not [text for text in [*labels, *texts(axes), axes.get_ylabel()] if "_" in text or "times" in text[:4]]
        assert not [text for text in texts(axes) if "10^" in text or "mathdefault" in text]


def test_a_series_has_one_colour_in_all_charts(tmp_path: Path, figures: list[Figure]) -> None:
    """And no two series of a picture share one."""
    plots.draw(tmp_path / "picture.svg", result("transport"))

    [figure] = figures
    colours: dict[str, set[str]] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            colours.setdefault(label, set()).add(handle.lines[0].get_color())
    assert colours.keys() == {"tcp", "socket (yardstick)", "shm"}
    assert all(len(own) == 1 for own in colours.values())
    assert len(set.union(*colours.values())) == 3
    assert {"64 B", "8 KiB", "2 MiB"} <= set(texts(figure.axes[0]))


def test_the_batches_of_a_timeline_have_colours_of_their_own(tmp_path: Path, figures: list[Figure]) -> None:
    """The legend does not use the colour of a batch for anything else."""
    plots.draw(tmp_path / "picture.png", result("pipeline"))

    [legend] = figures[0].legends
    colours = [patch.get_facecolor()[:3] for patch in legend.get_patches()]
    assert {text.get_text() for text in legend.get_texts()} >= {"batch 0", "batch 1", "whole step"}
    assert len(set(colours)) == len(colours)


def test_the_legend_covers_no_heading(tmp_path: Path, figures: list[Figure]) -> None:
    """However long the conditions are."""
    long = Result("exchange", "a condition that takes many words to say " * 4, ROWS["exchange"], MACHINE)
    plots.draw(tmp_path / "picture.png", long)

    [figure] = figures
    heading, legend = figure._suptitle.get_window_extent(), figure.legends[0].get_window_extent()  # type: ignore[attr-defined]
    assert not heading.overlaps(legend)


def test_several_runs_are_one_picture(tmp_path: Path, figures: list[Figure]) -> None:
    """The median of all values of all runs is drawn, with the range; every single bar's run is a point."""
    files = []
    for number, rate in enumerate((40.0, 50.0, 90.0)):
        files.append(tmp_path / f"{number}.json")
        own = result("throughput", [throughput("lamina", rate), throughput("vllm", 50.0)])
        files[-1].write_text(json.dumps(msgspec.to_builtins(own)))
    plots.draw(tmp_path / "picture.png", report.read(files))

    [axes] = figures[0].axes
    assert [round(bar.get_height(), 3) for bar in axes.patches] == [1.0, 1.0]
    singles = next(line for line in axes.lines if line.get_label() == "a single run")
    assert sorted(singles.get_ydata()) == pytest.approx([0.8, 1.0, 1.8])

    figures.clear()
    plots.draw(tmp_path / "picture.png", result("decode"))
    lines = {c.get_label(): c for c in figures[0].axes[0].containers}
    assert list(lines["Lamina"].lines[0].get_ydata()) == [20.0, 200.0]
    assert lines["Lamina"].has_yerr


def test_runs_under_different_conditions_are_not_mixed(tmp_path: Path) -> None:
    """The sentence names the file and both conditions."""
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, about in zip(files, ("links over shm", "links over tcp"), strict=True):
        file.write_text(json.dumps({"bench": "decode", "about": about, "rows": [], "machine": {}}))
    with pytest.raises(ConfigError, match=r"b.json: is a run of bench decode \(links over tcp\); .*links over shm"):
        report.read(files)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"rows": [], "machine": {}}', '{"bench": "x", "about": "", "rows": [], "machine": {}}']
)
def test_a_file_that_is_no_result_is_refused(text: str, tmp_path: Path) -> None:
    """One sentence names the file and says what was expected."""
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=r"x.json: is not what `lamina bench NAME --json` prints: "):
        report.read([tmp_path / "x.json"])


BENCHMARKS_WITH_PLOTS = ("decode", "attention", "transport", "pipeline", "throughput")


@pytest.mark.parametrize("bench", BENCHMARKS_WITH_PLOTS)
def test_a_picture_that_cannot_be_drawn_is_refused_before_the_run(bench: str, tmp_path: Path) -> None:
    """A folder that does not exist, an unknown format: one sentence at once, not after minutes of measuring."""
    for plot, why in (
        ("none/picture.png", "does not exist; make it first"),
        ("picture.xyz", "expected a file that ends"),
    ):
        command = [sys.executable, "-m", "lamina", "bench", bench, "--quick", "--plot", str(tmp_path / plot)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=os.environ)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("lamina: --plot: ")
        assert why in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_model_that_does_not_exist_is_one_sentence() -> None:
    """Before any node starts."""
    command = [sys.executable, "-m", "lamina", "bench", "decode", "--model", "nosuch"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "lamina: nosuch: no such checkpoint directory\n"
