"""What commands print for people: tables, facts and sentences, which read well at any width and in a pipe.

A table whose lines fit the width is printed as aligned columns. One that does not becomes a block of ``name: value``
lines for each row on a terminal, and lines of comma-separated values elsewhere. Nothing is ever cut.
"""

from __future__ import annotations

import csv
import os
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

Cell = str | int | float | Text | None
"""A number is written with three significant digits at least; a Text keeps its style on a terminal."""

_GAP = 2
"""Columns of the screen between two columns of a table."""
_PROSE_WIDTH = 24
"""The narrowest that a column of prose may become."""
_RULE = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
"""A line of dashes between the headings and the rows, and nothing else."""


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[Cell]], *, title: str = "", prose: Collection[str] = ()
) -> None:
    """Print ``rows`` under ``headings`` on standard output; a row that is too short ends in empty cells.

    On a terminal, the columns named in ``prose`` may be wrapped between words to make the table fit.
    """
    filled = _filled(headings, rows)
    terminal = sys.stdout.isatty()
    if title:
        print_text(title)
    if terminal or _fits(headings, filled, ()):
        _print(_drawn(headings, filled, prose))
    else:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(headings)
        writer.writerows([_plain(cell) for cell in row] for row in filled)


def draw_table(headings: Sequence[str], rows: Iterable[Sequence[Cell]]) -> RenderableType:
    """Return what `print_table` prints on a terminal, for one that is drawn anew again and again."""
    return _drawn(headings, _filled(headings, rows), ())


def print_facts(facts: Mapping[str, Cell]) -> None:
    """Print a ``name: value`` line for each fact that has a value; a terminal gets long values wrapped."""
    _print(_block(list(facts.items())))


def print_text(sentence: str, console: Console | None = None) -> None:
    """Print a sentence as it stands. A terminal gets it wrapped between words; elsewhere it stays one line.

    ``console`` is where it goes, by default standard output.
    """
    console = console or _console()
    lines = _wrapped(sentence, console.width) if console.is_terminal else [sentence]
    for line in lines:
        console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)


def discard_output() -> None:
    """Let all that is, and will be, written to standard output vanish, as nothing can take it."""
    with suppress(OSError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)


def text(cell: Cell) -> str:
    """A cell as people read it: numbers in groups of three digits, and no more digits than are worth reading."""
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    if isinstance(cell, int):
        return f"{cell:,}"
    return _plain(cell)


def _plain(cell: Cell) -> str:
    """A cell as programs read it: without separators in numbers."""
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return " ".join(str(cell).splitlines())


def _console() -> Console:
    # Rich would take its width from any stream that is a terminal, and colours from the environment even in a pipe.
    terminal = None if sys.stdout.isatty() else False
    return Console(width=shutil.get_terminal_size().columns, force_terminal=terminal, highlight=False)


def _fits(headings: Sequence[str], rows: Sequence[Sequence[Cell]], prose: Collection[str]) -> bool:
    """Whether no line of the table is longer than the width, with columns of prose as narrow as they may be."""
    total = _GAP * (len(headings) - 1)
    for i, heading in enumerate(headings):
        texts = [heading, *(text(row[i]) for row in rows)]
        natural = max(map(cell_len, texts))
        longest_word = max((cell_len(word) for line in texts for word in line.split()), default=0)
        total += min(natural, max(longest_word, _PROSE_WIDTH)) if heading in prose else natural
    return total <= shutil.get_terminal_size().columns


def _filled(headings: Sequence[str], rows: Iterable[Sequence[Cell]]) -> list[list[Cell]]:
    return [[*row, *[None] * (len(headings) - len(row))] for row in rows]


def _drawn(headings: Sequence[str], rows: Sequence[Sequence[Cell]], prose: Collection[str]) -> RenderableType:
    """Make columns, or a block for each row where they do not fit."""
    if _fits(headings, rows, prose):
        return _columns(headings, rows, prose)
    parts: list[RenderableType] = []
    for row in rows:
        parts += [Text(), _block(list(zip(headings, row, strict=True)))]
    return Group(*parts[1:])


def _columns(headings: Sequence[str], rows: Sequence[Sequence[Cell]], prose: Collection[str]) -> Table:
    table = Table(box=_RULE, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0), header_style="bold")
    for i, heading in enumerate(headings):
        numbers = all(cell is None or isinstance(cell, int | float) for cell in (row[i] for row in rows))
        wraps = heading in prose
        table.add_column(
            Text(heading),
            justify="right" if numbers else "left",
            no_wrap=not wraps,
            min_width=min(_PROSE_WIDTH, max(cell_len(text(row[i])) for row in rows)) if wraps and rows else None,
        )
    for row in rows:
        table.add_row(*(Text(text(cell), cell.style if isinstance(cell, Text) else "") for cell in row))
    return table


def _block(facts: Sequence[tuple[str, Cell]]) -> Group:
    """Make a line for each fact that has a value, or several on a terminal where one would be too long."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    known = [(name, cell) for name, cell in facts if text(cell)]
    indent = 2 + max((cell_len(name) for name, _ in known), default=0)
    lines = []
    for name, cell in known:
        label, style = f"{name}:".ljust(indent), cell.style if isinstance(cell, Text) else ""
        for line in _wrapped(text(cell), width - indent) if width else [text(cell)]:
            lines.append(Text.assemble(label, (line, style), no_wrap=True, overflow="ignore"))
            label = " " * indent
    return Group(*lines)


def _print(drawn: RenderableType) -> None:
    """Print it without spaces at the ends of lines."""
    console = _console()
    with console.capture() as printed:
        console.print(drawn, crop=False)
    sys.stdout.writelines(f"{line.rstrip()}\n" for line in printed.get().splitlines())


def _wrapped(sentence: str, width: int) -> list[str]:
    """Lines of at most ``width`` columns; a longer word, such as a path, gets a line of its own and stays whole."""
    return textwrap.wrap(sentence, max(width, _PROSE_WIDTH), break_long_words=False, break_on_hyphens=False) or [""]
