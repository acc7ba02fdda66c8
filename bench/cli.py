"""``lamina bench``, registered by an entry point."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from lamina.errors import LaminaError

app = typer.Typer(help="Measure, each figure beside a yardstick from the same run.", no_args_is_help=True)


@app.command()
def decode(
    model: Annotated[Path | None, typer.Option(help="A checkpoint directory; default: the demo's.")] = None,
    memory_nodes: Annotated[int, typer.Option(min=1, help="Memory nodes.")] = 2,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens generated per sequence.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats; the median is reported.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw tokens/s over the batch into this file.")] = None,
    quick: Annotated[bool, typer.Option(help="Fewer batches and one repeat.")] = False,
) -> None:
    """Decode over local nodes against transformers in one process, over the batch size."""
    from lamina.bench.decode import run

    run(model, memory_nodes=memory_nodes, tokens=tokens, repeats=repeats, as_json=as_json, plot=plot, quick=quick)


@app.command()
def attention(
    backend: Annotated[list[str] | None, typer.Option(help="Measure only this one; may be given again.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of everything; default: all cores.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the share of the bandwidth over the context.")] = None,
    quick: Annotated[bool, typer.Option(help="Two shapes of decode, one of prefill.")] = False,
) -> None:
    """Attention on the CPU against the memory's bandwidth, torch, and vLLM and llama.cpp where they are installed."""
    from lamina.bench.attention import run

    run(backend, threads=threads, as_json=as_json, plot=plot, quick=quick)


@app.command()
def slices(
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of everything; default: all cores.")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the slices.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quick: Annotated[bool, typer.Option(help="The larger model alone, and three batches.")] = False,
) -> None:
    """Slices on the CPU against their products alone, by oneDNN, and against the memory's bandwidth."""
    from lamina.bench.slices import run

    run(threads=threads, compiled=compiled, as_json=as_json, quick=quick)


@app.command()
def transport(
    transport: Annotated[list[str] | None, typer.Option(help="Measure only this one; may be given again.")] = None,
    rdma_device: Annotated[
        list[str] | None, typer.Option(help="RDMA device of both ends; given twice, of either. Default: the first two.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw round trips and bandwidth over the size.")] = None,
    quick: Annotated[bool, typer.Option(help="Fewer sizes and depths.")] = False,
) -> None:
    """Round trips and bandwidth of each transport on this machine, against programs that do only that."""
    from lamina.bench.transport import run

    run(transport, rdma_device, as_json=as_json, plot=plot, quick=quick)


@app.command()
def exchange(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quick: Annotated[bool, typer.Option(help="Shorter, and on two cores only.")] = False,
) -> None:
    """What a layer of a batch costs besides its work: two nodes over shm whose operations compute nothing."""
    from lamina.bench.exchange import run

    run(as_json=as_json, quick=quick)


@app.command()
def pipeline(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw one step of two batches, by layer, into this file.")] = None,
    quick: Annotated[bool, typer.Option(help="Up to two batches, and the balanced load.")] = False,
) -> None:
    """Several batches in flight over a compute and a memory node of one processor each, against one batch."""
    from lamina.bench.pipeline import run

    run(as_json=as_json, plot=plot, quick=quick)


@app.command()
def prefill(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quick: Annotated[bool, typer.Option(help="One prompt each.")] = False,
) -> None:
    """How much long prompts slow down those who decode meanwhile, for two sizes of their chunks."""
    from lamina.bench.prefill import run

    run(as_json=as_json, quick=quick)


@app.command()
def throughput(
    peers: Annotated[str, typer.Option(help="Engines to compare with, by commas.")] = "transformers,llama.cpp,vllm",
    models: Annotated[str, typer.Option(help="S (160 million parameters), M (1.1 billion), or T, a toy.")] = "S,M",
    shapes: Annotated[str | None, typer.Option(help="Batch x context, by commas, such as 1x512,32x2048.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw tokens/s over those of the best peer.")] = None,
    quick: Annotated[bool, typer.Option(help="Two shapes, one round, no sweep of threads.")] = False,
) -> None:
    """Decode throughput against other engines, each installed into an environment of its own at the first run."""
    from lamina.bench.throughput import parse_shapes, run

    chosen = parse_shapes(shapes) if shapes is not None else None
    run(_names(peers), _names(models), chosen, as_json=as_json, plot=plot, quick=quick)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@app.command(name="all")
def all_(quick: Annotated[bool, typer.Option(help="Fewer points and repeats.")] = False) -> None:
    """Every benchmark, with its defaults; one that fails keeps none of the others from running."""
    registered = [command.callback for command in app.registered_commands]
    run_each([benchmark for benchmark in registered if benchmark and benchmark is not all_], quick=quick)


def run_each(benchmarks: Sequence[Callable[..., None]], *, quick: bool) -> None:
    """Run one after the other. LaminaError, in the end, names those that failed."""
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
