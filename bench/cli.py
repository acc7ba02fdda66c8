"""``lamina bench``, registered by an entry point."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from lamina.cli import WholeHelp
from lamina.errors import LaminaError

app = typer.Typer(
    help="Measure, and show each figure beside a yardstick from the same run.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    cls=WholeHelp,
)


@app.command()
def decode(
    model: Annotated[Path | None, typer.Option(help="The checkpoint directory; default: the one of the demo.")] = None,
    memory_nodes: Annotated[int, typer.Option(min=1, help="The number of memory nodes.")] = 2,
    tokens: Annotated[int, typer.Option(min=8, help="The number of tokens to generate for each sequence.")] = 64,
    repeats: Annotated[
        int, typer.Option(min=1, help="The number of interleaved repeats, of which the median is reported.")
    ] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw tokens/s over the batch size into this file.")] = None,
    quick: Annotated[bool, typer.Option(help="Measure fewer batches, once.")] = False,
) -> None:
    """Compare decoding over local nodes with transformers in one process, by batch size."""
    from lamina.bench.decode import run

    run(model, memory_nodes=memory_nodes, tokens=tokens, repeats=repeats, as_json=as_json, plot=plot, quick=quick)


@app.command()
def attention(
    backend: Annotated[list[str] | None, typer.Option(help="Measure only this one; may be repeated.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="The number of threads; default: all cores.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the share of the read bandwidth over the context into this file.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Measure two shapes of decode and one of prefill.")] = False,
) -> None:
    """Compare attention on the CPU with the memory bandwidth, torch, and vLLM and llama.cpp if they are installed."""
    from lamina.bench.attention import run

    run(backend, threads=threads, as_json=as_json, plot=plot, quick=quick)


@app.command()
def slices(
    threads: Annotated[int | None, typer.Option(min=1, help="The number of threads; default: all cores.")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the slices.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quick: Annotated[bool, typer.Option(help="Measure only the larger model, with three batches.")] = False,
) -> None:
    """Compare slices on the CPU with their matrix products alone, by oneDNN, and with the memory bandwidth."""
    from lamina.bench.slices import run

    run(threads=threads, compiled=compiled, as_json=as_json, quick=quick)


@app.command()
def transport(
    transport: Annotated[list[str] | None, typer.Option(help="Measure only this one; may be repeated.")] = None,
    rdma_device: Annotated[
        list[str] | None,
        typer.Option(help="The RDMA device of both ends; repeated, one for each end. Default: the first two."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw round trips and bandwidth over the size into this file.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Measure fewer sizes and depths.")] = False,
) -> None:
    """Compare round trips and bandwidth of each transport on this machine with minimal programs."""
    from lamina.bench.transport import run

    run(transport, rdma_device, as_json=as_json, plot=plot, quick=quick)


@app.command()
def exchange(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quick: Annotated[bool, typer.Option(help="Measure for a shorter time, and only with two cores.")] = False,
) -> None:
    """Measure what a layer of a batch costs besides its work, with two nodes over shm that compute nothing."""
    from lamina.bench.exchange import run

    run(as_json=as_json, quick=quick)


@app.command()
def simulate(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quick: Annotated[bool, typer.Option(help="Measure fewer steps of the smaller clusters.")] = False,
) -> None:
    """Measure how many steps a second a simulated cluster makes when nothing is computed."""
    from lamina.bench.simulate import run

    run(as_json=as_json, quick=quick)


@app.command()
def drain(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quick: Annotated[bool, typer.Option(help="Measure shorter contexts, over shared memory only.")] = False,
) -> None:
    """Measure what sequences that decode notice while a memory node leaves, and how fast its blocks move."""
    from lamina.bench.drain import run

    run(as_json=as_json, quick=quick)


@app.command()
def pool(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw tokens/s by trace and system into this file.")] = None,
    quick: Annotated[bool, typer.Option(help="Measure fewer requests of the shorter traces.")] = False,
) -> None:
    """Compare one pool of memory with memory nodes that keep to themselves, by contexts with a long tail."""
    from lamina.bench.pool import run

    run(as_json=as_json, plot=plot, quick=quick)


@app.command()
def pipeline(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw one step of two batches, layer by layer, into this file.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Measure at most two batches in flight, with the balanced load.")] = False,
) -> None:
    """Compare several batches in flight with one batch, on a compute and a memory node with one processor each."""
    from lamina.bench.pipeline import run

    run(as_json=as_json, plot=plot, quick=quick)


@app.command()
def prefill(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quick: Annotated[bool, typer.Option(help="Measure one prompt for each size.")] = False,
) -> None:
    """Measure how much long prompts slow down the sequences that decode meanwhile, for two chunk sizes."""
    from lamina.bench.prefill import run

    run(as_json=as_json, quick=quick)


@app.command()
def throughput(
    peers: Annotated[
        str, typer.Option(help="The engines to compare with, separated by commas.")
    ] = "transformers,llama.cpp,vllm",
    models: Annotated[str, typer.Option(help="S (160 million parameters), M (1.1 billion), T (a toy).")] = "S,M",
    shapes: Annotated[
        str | None, typer.Option(help="Batch x context, separated by commas, such as 1x512,32x2048.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw tokens/s over those of the best peer into this file.")] = None,
    quick: Annotated[
        bool, typer.Option(help="Measure two shapes in one round, without a sweep of thread settings.")
    ] = False,
) -> None:
    """Compare decode throughput with other engines, which the first run installs into their own environments."""
    from lamina.bench.throughput import parse_shapes, run

    chosen = parse_shapes(shapes) if shapes is not None else None
    run(_names(peers), _names(models), chosen, as_json=as_json, plot=plot, quick=quick)


@app.command()
def endpoint(
    peer: Annotated[
        list[str] | None, typer.Option(help="Another server to compare with: vllm. The first run installs it.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="The checkpoint directory; default: the one of the demo.")] = None,
    streams: Annotated[int, typer.Option(min=1, max=1024, help="How many answers stream at the same time.")] = 64,
    tokens: Annotated[int, typer.Option(min=8, help="The number of tokens of each answer.")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quick: Annotated[bool, typer.Option(help="Measure shorter answers, in two rounds.")] = False,
) -> None:
    """Compare streams through the HTTP endpoint with those of the Python client, and of another server."""
    from lamina.bench.endpoint import run

    run(peer or (), model=model, streams=streams, tokens=tokens, as_json=as_json, quick=quick)


@app.command()
def plot(
    files: Annotated[list[Path], typer.Argument(help="What runs of one benchmark with --json printed.")],
    out: Annotated[Path, typer.Option(help="The picture to draw, such as decode.png or decode.svg.")],
) -> None:
    """Draw the results of one or several runs; of several, the medians and the range."""
    from lamina.bench import plots, report

    plots.check(out, "--out")
    plots.draw(out, report.read(files), "--out")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@app.command(name="all")
def all_(quick: Annotated[bool, typer.Option(help="Measure fewer points and repeats.")] = False) -> None:
    """Run every benchmark with its defaults. A benchmark that fails does not stop the others."""
    registered = [command.callback for command in app.registered_commands]
    run_each([benchmark for benchmark in registered if benchmark not in (None, all_, plot)], quick=quick)


def run_each(benchmarks: Sequence[Callable[..., None]], *, quick: bool) -> None:
    """Run the benchmarks one after the other. A LaminaError at the end names those that failed."""
    failed = []
    for benchmark in benchmarks:
        try:
            benchmark(quick=quick)
        except Exception as e:
            if not isinstance(e, LaminaError):
                traceback.print_exc()
            sys.stderr.write(f"lamina bench {benchmark.__name__}: {e}\n")
            failed.append(benchmark.__name__)
    if failed:
        raise LaminaError(f"{len(failed)} of {len(benchmarks)} benchmarks failed: {', '.join(failed)}")
