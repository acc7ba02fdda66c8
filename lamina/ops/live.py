"""What ``lamina status`` and ``lamina top`` share: when they look at the nodes, how they end, and their first line."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from lamina.config import ClusterConfig
from lamina.watch import ClusterWatch, NodeView, front_of

EVERY_S = 1.0
"""The seconds between two looks, over which rates are taken."""
COLOURS = {"ready": "green", "starting": "yellow", "waiting": "yellow", "draining": "yellow"}
"""The colour of each state; of all others, red."""

Draw = Callable[[list[NodeView]], RenderableType]
"""Makes what the terminal shows of the nodes."""


def can_draw() -> bool:
    """Whether standard output is a terminal on which something can be kept up to date."""
    return sys.stdout.isatty() and not Console().is_dumb_terminal


def draw_until_q(config: ClusterConfig, name: str, draw: Draw) -> None:
    """Keep the terminal up to date until q or Ctrl-C. ``name`` appears in the nodes' logs."""
    with Live(
        Text(f"asking {len(config.node)} nodes", style="dim"),
        console=Console(highlight=False),
        screen=True,
        auto_refresh=False,
        vertical_overflow="ellipsis",
    ) as live:
        live.refresh()
        look_until_q(config, name, lambda views: live.update(draw(views), refresh=True))


def look_until_q(config: ClusterConfig, name: str, take: Callable[[list[NodeView]], None]) -> None:
    """Give ``take`` what all nodes say, every second, until q or Ctrl-C."""
    asyncio.run(_look_until_q(config, name, take))


async def _look_until_q(config: ClusterConfig, name: str, take: Callable[[list[NodeView]], None]) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    with _keys(ended):
        async with ClusterWatch(config, name=name) as watch:
            asking = asyncio.ensure_future(ended.wait())
            while not ended.is_set():
                looking = asyncio.ensure_future(watch.look())
                await asyncio.wait((looking, asking), return_when=asyncio.FIRST_COMPLETED)
                if not looking.done():
                    looking.cancel()
                    await asyncio.wait((looking,))
                    break
                take(looking.result())
                await asyncio.wait((asking,), timeout=EVERY_S)
            asking.cancel()


def look_once(config: ClusterConfig, name: str) -> list[NodeView]:
    """Return what all nodes say, with the rates of one second if any node answers."""
    return asyncio.run(_look_once(config, name))


async def _look_once(config: ClusterConfig, name: str) -> list[NodeView]:
    async with ClusterWatch(config, name=name) as watch:
        views = await watch.look()
        if not any(view.status for view in views):
            return views
        await asyncio.sleep(EVERY_S)
        return await watch.look()


@contextmanager
def _keys(ended: asyncio.Event) -> Iterator[None]:
    """Set ``ended`` when q is pressed; keys are not shown meanwhile."""
    if not sys.stdin.isatty():
        yield
        return
    loop, descriptor = asyncio.get_running_loop(), sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed() -> None:
        with suppress(OSError):
            if set(os.read(descriptor, 64) or b"q") & set(b"qQ"):  # nothing to read: the terminal is gone
                ended.set()

    tty.setcbreak(descriptor)
    loop.add_reader(descriptor, pressed)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


# -- what is shown


def head(file: Path, views: Sequence[NodeView]) -> Text:
    """Return the line that says how many nodes are ready, and the epoch of the members."""
    ready = sum(view.is_ready for view in views)
    told = (f"{ready} of {len(views)} nodes ready", "green" if ready == len(views) else "yellow")
    line = Text.assemble(("Lamina", "bold"), f"  {file.name}  ", told)
    if (epoch := epoch_of(views)) is not None:
        line.append(f"  epoch {epoch}")
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def epoch_of(views: Sequence[NodeView]) -> int | None:
    """Return the epoch of the members, as the front says; None if it does not answer."""
    front = front_of(views)
    return front.status.epoch if front and front.status else None


def compact(count: int) -> str:
    """Return a count in four characters or so: 950, 32.8k, 1.05M."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def number(value: float) -> str:
    """Return a rate with no more digits than are worth reading."""
    return f"{value:,.0f}" if value >= 10 or not value else f"{value:.1f}"
