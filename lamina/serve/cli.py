"""The commands ``lamina serve`` and ``lamina batch``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from lamina.errors import ConfigError
from lamina.validation import option_name, parse_option

if TYPE_CHECKING:
    from lamina.config import ClusterConfig, Dtype
    from lamina.serve.local import LocalModel


Target = Annotated[
    Path, typer.Argument(metavar="CONFIG|MODEL_DIR", help="The file of a running cluster, or a checkpoint directory.")
]
Names = Annotated[
    list[str] | None,
    typer.Option(help="A name of the model for clients; repeatable; default: the name of its folder."),
]
Template = Annotated[Path | None, typer.Option(help="The file of a chat template; default: that of the checkpoint.")]
Tools = Annotated[str | None, typer.Option(help="How the model writes calls of tools; default: as its template shows.")]
Reasoning = Annotated[
    str | None, typer.Option(help="How the model writes its reasoning; default: as its template shows.")
]
Context = Annotated[
    int | None, typer.Option(min=1, help="With MODEL_DIR: the most tokens of a request; default: the model's.")
]
Memory = Annotated[
    str | None, typer.Option(help="With MODEL_DIR: the size of the KV cache; default: of what memory is free.")
]
Dtypes = Annotated[
    str | None,
    typer.Option(
        metavar="float32|bfloat16|float16", help="With MODEL_DIR: the data type to run in; default: as stored."
    ),
]
NoRestart = Annotated[
    bool, typer.Option("--no-restart", help="With MODEL_DIR: end when a node dies, instead of starting it again.")
]


def serve(
    target: Target,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0 is any free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="The file with the API keys, one a line; only its owner may read it.")
    ] = None,
    served_model_name: Names = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="The certificate in PEM, for https; needs --tls-key.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The key of the certificate.")] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="An origin whose pages may use the server in browsers; repeatable; * is any."),
    ] = None,
    max_body: Annotated[str, typer.Option(help="The size of the largest body of a request.")] = "16MiB",
    chat_template: Template = None,
    tool_parser: Tools = None,
    reasoning_parser: Reasoning = None,
    files: Annotated[
        Path | None,
        typer.Option(help="The folder of uploaded files and batches; default: one of the user's state folder."),
    ] = None,
    context: Context = None,
    memory: Memory = None,
    dtype: Dtypes = None,
    no_restart: NoRestart = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="With MODEL_DIR: show all logs instead of keeping them in files.")
    ] = False,
) -> None:
    """Serve a cluster over HTTP, as OpenAI's API does; for a checkpoint, start a cluster on this machine first."""
    from lamina.config import ClusterConfig, parse_size
    from lamina.serve.options import ChatOptions, ServeOptions

    options = ServeOptions(
        host=host,
        port=port,
        api_key_file=api_key_file,
        names=tuple(served_model_name or ()),
        tls_certificate=tls_certificate,
        tls_key=tls_key,
        origins=tuple(cors_origin or ()),
        max_body=parse_option("max_body", parse_size, max_body),
        chat=ChatOptions(chat_template, tool_parser, reasoning_parser),
        files=files,
    )
    options.check()
    cluster = _cluster(target, context, memory, dtype, no_restart=no_restart, verbose=verbose)
    if isinstance(cluster, ClusterConfig):
        from lamina.serve.run import run

        raise typer.Exit(run(cluster, options))
    from lamina.serve import local

    raise typer.Exit(local.run(cluster, options, verbose=verbose))


def batch(
    target: Target,
    requests: Annotated[
        Path, typer.Argument(metavar="REQUESTS", help="The requests, one a line, in the batch format of OpenAI's API.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write, with an answer for each line.")],
    concurrency: Annotated[int, typer.Option(min=1, max=4096, help="The most requests at the same time.")] = 512,
    served_model_name: Names = None,
    chat_template: Template = None,
    tool_parser: Tools = None,
    reasoning_parser: Reasoning = None,
    context: Context = None,
    memory: Memory = None,
    dtype: Dtypes = None,
    no_restart: NoRestart = False,
) -> None:
    """Answer a file of requests; started again after an interruption, it goes on where it was."""
    from lamina.serve.app import BATCHED
    from lamina.serve.batch.command import run
    from lamina.serve.options import ChatOptions

    cluster = _cluster(target, context, memory, dtype, no_restart=no_restart)
    chat = ChatOptions(chat_template, tool_parser, reasoning_parser)
    chat.check()
    names = tuple(served_model_name or ())
    raise typer.Exit(run(cluster, requests, output, BATCHED, concurrency=concurrency, names=names, chat=chat))


def _cluster(
    target: Path, context: int | None, memory: str | None, dtype: str | None, **flags: bool
) -> ClusterConfig | LocalModel:
    """Return the cluster of a file; or, for a checkpoint, the one to start. ``flags`` are more options that only a
    checkpoint can have."""
    from lamina.config import Dtype, load, parse_size

    if not target.is_dir():
        for key, given in {"context": context, "memory": memory, "dtype": dtype, **flags}.items():
            if given:
                raise ConfigError(
                    f"{option_name(key)}: only allowed with a checkpoint directory; {target} is a cluster file"
                )
        return load(target)
    from lamina.serve.local import LocalModel

    if dtype is not None and dtype not in get_args(Dtype):
        raise ConfigError(f"--dtype: expected one of {', '.join(get_args(Dtype))}; got {dtype!r}")
    size = None if memory is None else parse_option("memory", parse_size, memory)
    return LocalModel(target, context, size, cast("Dtype | None", dtype), restart=not flags["no_restart"])
