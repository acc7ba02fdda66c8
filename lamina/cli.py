"""Run the ``lamina`` command."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import typer
from msgspec.structs import replace
from typer.core import TyperGroup

from lamina.errors import ConfigError, LaminaError
from lamina.runtime.cpu import let_idle_threads_sleep
from lamina.transport import Address

if TYPE_CHECKING:
    from lamina.config import MemoryNodeConfig
    from lamina.transport import Options


class WholeHelp(TyperGroup):
    """Lists every command in the help with its whole description, which Typer would shorten."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, inspect.cleandoc(command.help or "")) for name, command in commands if command])


Value = TypeVar("Value")

app = typer.Typer(
    help="LLM decoding split at attention: compute nodes hold the weights, memory nodes the KV cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text reads well at any width and in a pipe
    cls=WholeHelp,
)

ConfigFile = Annotated[Path, typer.Option("--config", help="The cluster file.")]


@app.command()
def node(
    role: Annotated[str, typer.Option(help="The role of the node: compute or memory.")],
    config: Annotated[Path | None, typer.Option(help="The cluster file; needs --name.")] = None,
    name: Annotated[
        str | None, typer.Option(help="The name of the node in the file; without a file, a name for its log.")
    ] = None,
    listen: Annotated[str | None, typer.Option(help="Memory node without a file: the address to listen on.")] = None,
    memory: Annotated[
        str | None, typer.Option(help='Memory node without a file: the size of the KV cache, such as "2GiB".')
    ] = None,
    cpus: Annotated[
        str | None, typer.Option(help='The processors to run on, such as "0-3"; overrides the file.')
    ] = None,
    numa: Annotated[
        int | None, typer.Option(min=0, help="Memory node: the NUMA node of the KV cache; overrides the file.")
    ] = None,
    attention: Annotated[str | None, typer.Option(help="Memory node without a file: the attention backend.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Memory node without a file: the number of threads.")
    ] = None,
    transport: Annotated[
        str | None, typer.Option(help="Memory node without a file: auto, rdma, shm or tcp; default: auto.")
    ] = None,
    peer_timeout: Annotated[
        float | None, typer.Option(help="Memory node without a file: seconds of silence after which a peer is dead.")
    ] = None,
    rdma_device: Annotated[
        str | None, typer.Option(help='The RDMA device of this machine, such as "mlx5_0"; overrides the file.')
    ] = None,
    secret_file: Annotated[
        str | None, typer.Option(help="Memory node without a file: the file with the secret of the cluster.")
    ] = None,
    tls_certificate: Annotated[
        str | None,
        typer.Option(help="Memory node without a file: its certificate in PEM; needs --tls-key and --tls-authority."),
    ] = None,
    tls_key: Annotated[str | None, typer.Option(help="Memory node without a file: the key of the certificate.")] = None,
    tls_authority: Annotated[
        str | None,
        typer.Option(help="Memory node without a file: the authority that signed the certificates of all nodes."),
    ] = None,
) -> None:
    """Run one node of a cluster until it is stopped; SIGTERM lets it finish its requests."""
    let_idle_threads_sleep()
    from lamina.config import ComputeNodeConfig, load, parse_cpus
    from lamina.node import daemon
    from lamina.runtime.cpu import CpuDevice
    from lamina.runtime.sockets import Sockets

    if role not in ("compute", "memory"):
        raise ConfigError(f"--role: expected compute or memory, got {role!r}")
    processors = None if cpus is None else _parse("cpus", parse_cpus, cpus)
    overrides = {"cpus": processors, "numa": numa, "rdma_device": rdma_device}
    overrides = {key: value for key, value in overrides.items() if value is not None}
    own = {"listen": listen, "memory": memory, "threads": threads, "attention": attention}
    links = {"transport": transport, "peer_timeout": peer_timeout, "secret_file": secret_file}
    links |= {"tls_certificate": tls_certificate, "tls_key": tls_key, "tls_authority": tls_authority}
    if config is None:
        if role == "compute":
            raise ConfigError("--config: missing; a compute node needs the file that wires the cluster")
        chosen, options = _memory_node(name, own, links)
    else:
        for key, given in (own | links).items():
            if given is not None:
                raise ConfigError(f"{_option(key)}: not allowed with --config; set it in the file")
        if name is None:
            raise ConfigError("--name: missing; --config needs the name of the node to run")
        cluster = load(config)
        found = cluster.find(name)
        if found.role != role:
            raise ConfigError(f"{config}: {name!r} is a {found.role} node, but --role says {role}")
        if isinstance(found, ComputeNodeConfig):
            if numa is not None:
                raise ConfigError("--numa: not allowed for a compute node, which holds no KV cache")
            from lamina.node.compute import ComputeNode

            compute = replace(found, **overrides)
            device = CpuDevice(compute.device, cpus=compute.cpus, threads=compute.threads)
            raise typer.Exit(daemon.run(name, ComputeNode(cluster, compute, device=device, network=Sockets()).serve))
        chosen, options = found, cluster.links
    from lamina.node.memory import MemoryNode

    chosen = replace(chosen, **overrides)
    device = CpuDevice(cpus=chosen.cpus, threads=chosen.threads)
    memory_node = MemoryNode(chosen, chosen.options(options), device=device, network=Sockets())
    raise typer.Exit(daemon.run(chosen.name, memory_node.serve))


def _memory_node(name: str | None, own: dict[str, Any], links: dict[str, Any]) -> tuple[MemoryNodeConfig, Options]:
    """Return a memory node without a cluster file, from the options of the command line."""
    from lamina.config import Attention, MemoryNodeConfig, TransportConfig, TransportKind, parse_size

    if own["listen"] is None or own["memory"] is None:
        raise ConfigError("--listen and --memory: a memory node needs both, or --config and --name")
    for key, value, known in (
        ("attention", own["attention"], get_args(Attention)),
        ("transport", links["transport"], get_args(TransportKind)),
    ):
        if value is not None and value not in known:
            raise ConfigError(f"--{key}: expected one of {', '.join(known)}; got {value!r}")
    listen = _parse("listen", Address.parse, own.pop("listen"))
    memory = _parse("memory", parse_size, own.pop("memory"))
    given = {key: value for key, value in own.items() if value is not None}
    node = MemoryNodeConfig(name=name or f"memory-{listen.port}", address=listen, memory=memory, **given)
    if links["peer_timeout"] is None:
        del links["peer_timeout"]
    options = TransportConfig(kind=links.pop("transport") or "auto", **links).options(Path(), _option)
    if not listen.is_loopback and options.secret is None:
        raise ConfigError(
            f"--listen: {listen} is not a loopback address, so it needs --secret-file with the secret of the cluster; "
            "`lamina secret` makes one"
        )
    return node, options


def _parse(key: str, parse: Callable[[str], Value], text: str) -> Value:
    """Read the text of an option. A ConfigError names the option."""
    try:
        return parse(text)
    except ConfigError as e:
        raise ConfigError(f"{_option(key)}: {e}") from e


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


@app.command()
def secret(
    file: Annotated[Path, typer.Argument(help="The file to make, which transport.secret_file then names.")],
) -> None:
    """Make a file with a new cluster secret. Every node and client needs a copy that only its owner can read."""
    from lamina.config import write_secret

    write_secret(file)


@app.command()
def up(config: Annotated[Path, typer.Argument(help="The cluster file.")]) -> None:
    """Start all nodes of a cluster file on this machine and show their states until Ctrl-C."""
    from lamina.cluster.up import run
    from lamina.config import load

    raise typer.Exit(run(load(config)))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    config: ConfigFile,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The maximum number of tokens to generate.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="The sampling temperature; 0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample only from the k likeliest tokens; 0 means all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Sample only from the likeliest tokens whose probabilities add up to this.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The seed of the sampling; the same seed gives the same text.")
    ] = None,
) -> None:
    """Stream the continuation of a prompt from a running cluster."""
    from lamina.client import connect
    from lamina.config import load

    cluster = load(config)
    links = cluster.links

    async def stream() -> None:
        async with connect(
            cluster.front.address, secret=links.secret, tls=links.tls, deadline_s=5.0, peer_timeout=links.peer_timeout
        ) as client:
            answer = client.stream(
                prompt, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
            )
            async for token in answer:
                sys.stdout.write(token.text)
                sys.stdout.flush()
            sys.stdout.write(answer.held_back + "\n")

    asyncio.run(stream())


@app.command()
def convert(
    path: Annotated[Path, typer.Argument(help="The checkpoint directory.")],
    dtype: Annotated[str | None, typer.Option(help="The data type to run in; default: as stored.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="The batch size for the minimum bandwidth.")] = 64,
    step_ms: Annotated[
        float, typer.Option(help="The time of a decode step in milliseconds, for the minimum bandwidth.")
    ] = 50.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Cut a checkpoint into slices and print their sizes and traffic, without reading the weights."""
    import json

    from lamina.model.files import DTYPES

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype: expected one of {', '.join(DTYPES)}; got {dtype!r}")
    from lamina.model.report import report

    found = report(path, dtype, batch, step_ms)
    if as_json:
        sys.stdout.write(json.dumps(found.as_json(), indent=2) + "\n")
    else:
        found.print_tables()


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Option(help="Check and measure the nodes of this file as well.")] = None,
    step_ms: Annotated[
        float, typer.Option(min=0.001, help="The time of a decode step in milliseconds, for the minimum bandwidth.")
    ] = 50.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this machine and, with a cluster file, its nodes and the links between them."""
    from lamina.ops.doctor.report import run

    raise typer.Exit(run(config, step_ms=step_ms, as_json=as_json))


@app.command()
def trace(
    config: ConfigFile,
    out: Annotated[Path, typer.Option(help="The file to write, for ui.perfetto.dev or chrome://tracing.")],
    seconds: Annotated[float, typer.Option(min=0.001, max=60, help="How long to record.")] = 2.0,
) -> None:
    """Record what every node of a running cluster computes and waits for, by request, batch and layer."""
    from lamina.config import load
    from lamina.ops.trace import run

    run(load(config), seconds, out)


@app.command()
def demo(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Decode with the shipped small model over three local nodes, and compare with transformers."""
    from lamina.demo.run import run

    raise typer.Exit(run(as_json=as_json))


def main() -> None:
    """Run the command; an error becomes one sentence on standard error and an exit status."""
    for command in entry_points(group="lamina.commands"):
        app.add_typer(command.load(), name=command.name)
    try:
        app(standalone_mode=True)
    except LaminaError as e:
        sys.stderr.write(f"lamina: {e}\n")
        sys.exit(e.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
