"""``lamina generate``: the continuation of a prompt by a running cluster."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from lamina.client import AsyncClient, Prompt, connect
from lamina.config import TransportConfig, load
from lamina.errors import ConfigError, LaminaError
from lamina.transport import Address, Options

CONNECT_S = 5.0


def run(cluster: str, prompt: Prompt, links: TransportConfig, *, as_json: bool, **settings: Any) -> None:
    """Print the continuation of ``prompt`` while it comes, or one JSON object at the end.

    ``cluster`` is a cluster file, or the address of a front, which is reached as ``links`` says. ``settings`` are
    those of `AsyncClient.stream`.
    """
    addresses, options = _fronts(cluster, links)
    asyncio.run(_generate(addresses, options, prompt, as_json, settings))


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """Return the prompt of the command line, of ``file``, or, for "-", of standard input."""
    if (prompt is None) == (file is None):
        raise ConfigError("PROMPT or --prompt-file: expected one of them; PROMPT - is standard input")
    name = "standard input" if file is None else str(file)
    try:
        if file is not None:
            return file.read_text(encoding="utf-8")
        return sys.stdin.buffer.read().decode() if prompt == "-" else str(prompt)
    except OSError as e:
        raise ConfigError(f"{name} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{name}: expected text in UTF-8") from e


def read_ids(prompt: str | None, file: Path | None) -> list[int]:
    """Return the prompt as token ids, which are separated by spaces or commas."""
    words = read_prompt(prompt, file).replace(",", " ").split()
    wrong = next((word for word in words if not (word.isascii() and word.isdigit() and len(word) < 20)), None)
    if wrong is not None:
        raise ConfigError(f"--prompt-ids: expected token ids, separated by spaces or commas, got {wrong!r:.200}")
    return list(map(int, words))


def _fronts(cluster: str, links: TransportConfig) -> tuple[list[Address], Options]:
    """Return the addresses of all nodes that may be the front."""
    file = Path(cluster)
    if "://" not in cluster and (file.exists() or ":" not in cluster):
        if links != TransportConfig():
            raise ConfigError("--secret-file and --tls-...: not allowed with a cluster file; set them in the file")
        config = load(file)
        return [node.address for node in config.compute_nodes], config.links
    return [Address.parse(cluster)], links.options(Path(), lambda key: f"--{key.replace('_', '-')}")


async def _generate(
    addresses: list[Address], options: Options, prompt: Prompt, as_json: bool, settings: dict[str, Any]
) -> None:
    async with connect(
        addresses, secret=options.secret, tls=options.tls, deadline_s=CONNECT_S, peer_timeout=options.peer_timeout
    ) as client:
        if as_json:
            completion = await client.generate(prompt, **settings)
            sys.stdout.write(json.dumps(msgspec.to_builtins(completion), indent=2) + "\n")
        else:
            await _stream(client, prompt, settings)


async def _stream(client: AsyncClient, prompt: Prompt, settings: dict[str, Any]) -> None:
    answer = client.stream(prompt, **settings)
    last = "\n"
    try:
        async for token in answer:
            sys.stdout.write(token.text)
            sys.stdout.flush()
            last = token.text or last
    except LaminaError:
        if not last.endswith("\n"):
            sys.stdout.write("\n")  # the error stands on a line of its own
            sys.stdout.flush()
        raise
    sys.stdout.write(answer.held_back + "\n")
