"""The commands ``lamina status``, ``top``, ``doctor``, ``trace`` and ``drain``, which ask the nodes of a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamina.limits import MAX_LEASE

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The cluster file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def status(
    config: ConfigFile,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Show it anew every second until q or Ctrl-C; with --json, one object a line."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the state of every node of a cluster file; the exit status is 0 if all are ready, else 1."""
    from lamina.config import load
    from lamina.ops.status import run

    raise typer.Exit(run(load(config), as_json=as_json, watch=watch))


def top(config: ConfigFile) -> None:
    """Show live what the nodes of a cluster file do; q ends it. In a pipe, print what they do in one second."""
    from lamina.config import load
    from lamina.ops.top import run

    raise typer.Exit(run(load(config)))


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG", help="The cluster file, to check and measure its nodes as well.", show_default=False
        ),
    ] = None,
    step_ms: Annotated[
        float, typer.Option(min=0.001, help="The time of a decode step in milliseconds, for the minimum bandwidth.")
    ] = 50.0,
    as_json: Json = False,
) -> None:
    """Check this machine and, with a cluster file, its nodes and the links between them."""
    from lamina.ops.doctor.report import run

    raise typer.Exit(run(config, step_ms=step_ms, as_json=as_json))


def trace(
    config: ConfigFile,
    out: Annotated[Path, typer.Option(help="The file to write, for ui.perfetto.dev or chrome://tracing.")],
    seconds: Annotated[float, typer.Option(min=0.001, max=60, help="How many seconds to record.")] = 2.0,
) -> None:
    """Record what every node of a running cluster computes and waits for, by request, batch and layer."""
    from lamina.config import load
    from lamina.ops.trace import run

    run(load(config), seconds, out)


def drain(
    config: ConfigFile,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The memory node that is to leave.")],
    patience: Annotated[
        float,
        typer.Option(
            min=0,
            max=MAX_LEASE,
            help="The seconds after which what finds no room on the other nodes is computed anew there.",
        ),
    ] = 60.0,
) -> None:
    """Empty a memory node of a running cluster, and take it out; no request fails. It comes back when it is started
    again."""
    from lamina.config import load
    from lamina.ops.drain import run

    run(load(config), name, patience)
