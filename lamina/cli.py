"""Run the ``lamina`` command."""

from __future__ import annotations

import errno
import inspect
import os
import re
import signal
import sys
from contextlib import suppress
from functools import partial
from importlib.metadata import entry_points
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from msgspec.structs import replace
from typer.core import TyperGroup

from lamina.errors import ConfigError, LaminaError
from lamina.log import report_failure
from lamina.ops.cli import ConfigFile, Json, doctor, drain, status, top, trace
from lamina.runtime.cpu import let_idle_threads_sleep
from lamina.serve.cli import batch, serve
from lamina.table import discard_output
from lamina.transport import Address
from lamina.validation import option_name, parse_option


class WholeHelp(TyperGroup):
    """Lists every command in the help with its whole description, which Typer would shorten."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, inspect.cleandoc(command.help or "")) for name, command in commands if command])


app = typer.Typer(
    help="LLM decoding split at attention: compute nodes hold the weights, memory nodes the KV cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text reads well at any width and in a pipe
    context_settings={"help_option_names": ["-h", "--help"]},
    cls=WholeHelp,
)

LogFormat = Annotated[
    str | None,
    typer.Option(metavar="logfmt|json", help="How to write the log; default: as the cluster file says, else logfmt."),
]


def _print_version(asked: bool) -> None:
    if asked:
        import lamina

        sys.stdout.write(f"lamina {lamina.__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of ``lamina`` itself."""


@app.command()
def node(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="The cluster file; needs --name.", show_default=False)
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The name of the node in the file; without a file, a name for its log.")
    ] = None,
    role: Annotated[
        str | None,
        typer.Option(
            metavar="compute|memory", help="The role of the node; with a file, it must be the one that the file says."
        ),
    ] = None,
    join: Annotated[
        str | None,
        typer.Option(
            metavar="FRONT",
            help="Without a file: become a member of the running cluster whose front has this address, host:port; a "
            "compute node becomes a replica.",
        ),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="Node without a file: the address to listen on, host:port.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="With --join: the address where other nodes reach this one, host:port; default: --listen."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help='Memory node without a file: the size of the KV cache, such as "2GiB".')
    ] = None,
    cpus: Annotated[
        str | None, typer.Option(help='The processors to run on, such as "0-3"; overrides the file.')
    ] = None,
    numa: Annotated[
        int | None, typer.Option(min=0, help="Memory node: the NUMA node of the KV cache; overrides the file.")
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            metavar="auto|native|torch", help="Memory node without a file: the attention backend; default: auto."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="cpu|cuda:N", help="Compute node with --join: its device; default: cpu.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            help="Node without a file: the number of threads; default: one for each of --cpus, else all cores.",
        ),
    ] = None,
    transport: Annotated[
        str | None,
        typer.Option(metavar="auto|rdma|shm|tcp", help="Node without a file: the transport; default: auto."),
    ] = None,
    peer_timeout: Annotated[
        float | None,
        typer.Option(help="Node without a file: seconds of silence after which a peer is dead; default: 2."),
    ] = None,
    rdma_device: Annotated[
        str | None, typer.Option(help='The RDMA device of this machine, such as "mlx5_0"; overrides the file.')
    ] = None,
    secret_file: Annotated[
        str | None, typer.Option(help="Node without a file: the file with the secret of the cluster.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Node without a file: the address where Prometheus finds metrics, host:port; default: none."),
    ] = None,
    tls_certificate: Annotated[
        str | None,
        typer.Option(help="Node without a file: its certificate in PEM; needs --tls-key and --tls-authority."),
    ] = None,
    tls_key: Annotated[str | None, typer.Option(help="Node without a file: the key of the certificate.")] = None,
    tls_authority: Annotated[
        str | None,
        typer.Option(help="Node without a file: the authority that signed the certificates of all nodes."),
    ] = None,
    log_format: LogFormat = None,
) -> None:
    """Run one node of a cluster until it is stopped; SIGTERM lets it finish its requests, and SIGHUP lets the front
    read the cluster file again."""
    let_idle_threads_sleep()
    from lamina.config import ComputeNodeConfig, load, parse_cpus
    from lamina.log import choose_format
    from lamina.node import daemon

    format_ = choose_format(log_format)
    if role not in (None, "compute", "memory"):
        raise ConfigError(f"--role: expected compute or memory, got {role!r}")
    processors = None if cpus is None else parse_option("cpus", parse_cpus, cpus)
    overrides = {"cpus": processors, "numa": numa, "rdma_device": rdma_device}
    overrides = {key: value for key, value in overrides.items() if value is not None}
    own = {"listen": listen, "address": address, "threads": threads, "metrics": metrics}
    own |= {"memory": memory, "attention": attention, "device": device, "join": join}
    links = {"transport": transport, "peer_timeout": peer_timeout, "secret_file": secret_file}
    links |= {"tls_certificate": tls_certificate, "tls_key": tls_key, "tls_authority": tls_authority}
    if config is None:
        if role is None:
            raise ConfigError("CONFIG: missing; without a cluster file, --role memory runs a memory node")
        if role == "compute" and join is None:
            raise ConfigError("CONFIG: missing; a compute node needs the file that wires the cluster, or --join")
        if address is not None and join is None:
            raise ConfigError("--address: not allowed without --join; where a memory node listens, --listen says")
        from lamina.node.unfiled import links_of, memory_node_of, run_replica

        wiring, options = links_of(links)
        front = None if join is None else parse_option("join", Address.parse, join)
        if role == "compute" and front is not None:
            raise typer.Exit(run_replica(front, name, own, overrides, wiring, options, format_))
        chosen = memory_node_of(name, own, options, joins=front is not None)
    else:
        for key, given in (own | links).items():
            if given is not None:
                raise ConfigError(f"{option_name(key)}: not allowed with a cluster file; set it in the file")
        if name is None:
            raise ConfigError("--name: missing; CONFIG needs the name of the node to run")
        cluster = load(config)
        format_ = choose_format(log_format, cluster.log.format)
        found = cluster.find(name)
        if role not in (None, found.role):
            raise ConfigError(f"{config}: {name!r} is a {found.role} node, but --role says {role}")
        if isinstance(found, ComputeNodeConfig):
            if numa is not None:
                raise ConfigError("--numa: not allowed for a compute node, which holds no KV cache")
            compute = replace(found, **overrides)

            def make_compute() -> daemon.Daemon:
                from lamina.node.compute import ComputeNode
                from lamina.runtime.cpu import CpuDevice
                from lamina.runtime.sockets import Sockets

                device = CpuDevice(compute.device, cpus=compute.cpus, threads=compute.threads)
                node = ComputeNode(cluster, compute, device=device, network=Sockets())
                return daemon.Daemon(node.serve, node.reload)

            raise typer.Exit(daemon.run(name, make_compute, format_))
        chosen, options, front = found, cluster.links, None
    chosen = replace(chosen, **overrides)

    def make_memory() -> daemon.Daemon:
        from lamina.node.joining import Joining
        from lamina.node.memory import MemoryNode
        from lamina.runtime.cpu import CpuDevice
        from lamina.runtime.sockets import Sockets

        device, network, links = CpuDevice(cpus=chosen.cpus, threads=chosen.threads), Sockets(), chosen.options(options)
        serve = MemoryNode(chosen, links, device=device, network=network).serve
        if front is not None:
            serve = partial(Joining(front, chosen, network, links).serve, serve)
        return daemon.Daemon(serve)

    raise typer.Exit(daemon.run(chosen.name, make_memory, format_))


@app.command()
def secret(
    file: Annotated[Path, typer.Argument(help="The file to make, which transport.secret_file then names.")],
) -> None:
    """Make a file with a new cluster secret. Every node and client needs a copy that only its owner can read."""
    from lamina.config import write_secret

    write_secret(file)
    sys.stdout.write(f"made {file}; every node and client needs a copy, and transport.secret_file names it\n")


@app.command()
def up(
    config: ConfigFile,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the logs of the nodes instead of keeping them in files.")
    ] = False,
    no_restart: Annotated[
        bool, typer.Option("--no-restart", help="End when a node dies, instead of starting it again.")
    ] = False,
    log_format: LogFormat = None,
) -> None:
    """Run all nodes of a cluster file on this machine and show their states until Ctrl-C; one that dies starts
    again."""
    from lamina.cluster.up import run
    from lamina.config import load
    from lamina.log import choose_format

    cluster = load(config)
    format_ = choose_format(log_format, cluster.log.format)
    raise typer.Exit(run(cluster, restart=not no_restart, verbose=verbose, log_format=format_))


app.command()(serve)
app.command()(batch)
app.command()(status)
app.command()(top)


@app.command()
def generate(
    cluster: Annotated[
        str, typer.Argument(metavar="CONFIG", help="The cluster file, or the address of the front, host:port.")
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="The text to continue; - is standard input.", show_default=False),
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="The file with the text to continue.")] = None,
    prompt_ids: Annotated[
        bool, typer.Option("--prompt-ids", help="The prompt is token ids, separated by spaces or commas.")
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="The maximum number of tokens to generate; default: what the context leaves."),
    ] = None,
    min_tokens: Annotated[
        int, typer.Option(min=0, help="The minimum number of tokens to generate: nothing stops the text earlier.")
    ] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End the text before this text; may be given several times.", show_default=False),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on behind the tokens with which the model ends its texts.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="The sampling temperature; 0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample only from the k likeliest tokens; 0 means all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Sample only from the likeliest tokens whose probabilities add up to this.")
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Sample only tokens with at least this part of the probability of the likeliest one."
        ),
    ] = 0.0,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            help="Make tokens of the prompt and the text less likely, if more than 1.", show_default="the checkpoint's"
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The seed of the sampling; the same seed gives the same text.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end: text, tokens and why it ended.")
    ] = False,
    secret_file: Annotated[
        str | None, typer.Option(help="With an address: the file with the secret of the cluster.")
    ] = None,
    tls_certificate: Annotated[
        str | None,
        typer.Option(help="With an address: a certificate in PEM; needs --tls-key and --tls-authority."),
    ] = None,
    tls_key: Annotated[str | None, typer.Option(help="With an address: the key of the certificate.")] = None,
    tls_authority: Annotated[
        str | None, typer.Option(help="With an address: the authority that signed the certificates of all nodes.")
    ] = None,
) -> None:
    """Stream the continuation of a prompt from a running cluster."""
    from lamina.config import TransportConfig
    from lamina.ops.generate import read_ids, read_prompt, run

    links = TransportConfig(
        secret_file=secret_file, tls_certificate=tls_certificate, tls_key=tls_key, tls_authority=tls_authority
    )
    run(
        cluster,
        read_ids(prompt, prompt_file) if prompt_ids else read_prompt(prompt, prompt_file),
        links,
        as_json=as_json,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=stop or [],
        ignore_eos=ignore_eos,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )


@app.command()
def convert(
    path: Annotated[Path, typer.Argument(help="The checkpoint directory.")],
    dtype: Annotated[
        str | None,
        typer.Option(metavar="float32|bfloat16|float16", help="The data type to run in; default: as stored."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="The batch size for the minimum bandwidth.")] = 64,
    step_ms: Annotated[
        float, typer.Option(help="The time of a decode step in milliseconds, for the minimum bandwidth.")
    ] = 50.0,
    as_json: Json = False,
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


app.command()(doctor)
app.command()(trace)
app.command()(drain)


@app.command()
def demo(as_json: Json = False) -> None:
    """Decode with the shipped small model over three local nodes, and compare with transformers."""
    from lamina.demo.run import run

    raise typer.Exit(run(as_json=as_json))


_UsageError: Any = typer.BadParameter.__base__
"""What Typer raises for a wrong command line; its name is private in some releases."""


def main() -> None:
    """Run the command; an error becomes one sentence on standard error and an exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the encoding lacks must not end the command
    try:
        for command in entry_points(group="lamina.commands"):
            app.add_typer(command.load(), name=command.name)
        status = app(prog_name="lamina", standalone_mode=False)
        sys.stdout.flush()
    except LaminaError as e:
        report_failure(e)
        _fail(str(e), e.exit_status)
    except _UsageError as e:
        _fail_usage(e)
    except typer.Abort:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        discard_output()
        sys.exit(1)  # as Typer does where the reader goes away earlier
    except OSError as e:
        if e.filename is not None or e.errno not in _OUTPUT_ERRORS:
            raise
        discard_output()
        _fail(f"standard output cannot be written: {os.strerror(e.errno)}", 1)
    sys.exit(status if isinstance(status, int) else 0)


_OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def _fail(sentence: str, status: int) -> NoReturn:
    with suppress(OSError):
        sys.stderr.write(f"lamina: {sentence}\n")
        sys.stderr.flush()
    sys.exit(status)


def _fail_usage(error: Any) -> NoReturn:
    """Say what is wrong with the command line, in the words of Typer but in the form of all other errors."""
    command = error.ctx.command_path if error.ctx else "lamina"
    text = str(error.format_message())
    if text.count("\n") > 2:  # a group without a command: the text is its help
        sys.stderr.write(text + "\n")
        sys.exit(error.exit_code)
    if match := re.fullmatch(r"Invalid value for '?(?P<name>[^']+?)'?: (?P<reason>.*)", text, re.DOTALL):
        text = f"{match['name']}: {match['reason']}"
    text = " ".join(text.split()).rstrip(".")
    text = re.sub(r"\. Did you mean (.*)\?|\(Possible options: (.*)\)", r"; did you mean \1\2?", text)
    text = text.replace(" ; ", "; ")
    text = re.sub(r"^[A-Z]|(?<=: )[A-Z]", lambda first: first[0].lower(), text)
    _fail(text if text.endswith("?") else f"{text}; see `{command} --help`", error.exit_code)
