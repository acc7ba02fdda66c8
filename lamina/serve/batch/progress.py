"""How a batch proceeds, on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from lamina.serve.batch.run import AnsweredLine

_GUESS_AFTER_S = 3.0
"""The time that is left is not guessed before."""
SAY_EVERY_S = 10.0
"""How often a line is written where there is no terminal."""


class BatchProgress:
    """Counts what is answered, and shows it: ``with BatchProgress() as progress``."""

    def __init__(self) -> None:
        self.total = self.done = self.failed = self.tokens = 0
        self._before = 0
        """Lines that earlier runs answered."""
        self._begun_s = self._said_s = time.monotonic()
        console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("answered"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[about]}"),
            console=console,
            transient=True,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, about="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begun(self, total: int, done: int) -> None:
        """See `lamina.serve.batch.run.Watcher`."""
        self.total, self.done, self._before = total, done, done
        self._begun_s = time.monotonic()
        if done:
            self._say(f"{done} of {total} lines were answered before")

    def answered(self, answered: AnsweredLine) -> None:
        """See `lamina.serve.batch.run.Watcher`."""
        self.done += 1
        self.failed += answered.status >= 400
        self.tokens += answered.tokens
        self._bar.update(self._task, completed=self.done, total=self.total, about=self.about)
        if self._bar.disable and time.monotonic() >= self._said_s + SAY_EVERY_S:
            self._said_s = time.monotonic()
            self._say(f"answered {self.done} of {self.total} lines; {self.about}")

    @property
    def about(self) -> str:
        """Speed, the time that is left, and failures, in words."""
        seconds = max(1e-3, time.monotonic() - self._begun_s)
        here = self.done - self._before
        left_s = (self.total - self.done) * seconds / max(1, here)
        words = [f"{self.tokens / seconds:.0f} tokens/s"]
        if seconds >= _GUESS_AFTER_S:
            words.append(f"{_duration(left_s)} left")
        if self.failed:
            words.append(f"{self.failed} failed")
        return ", ".join(words)

    def _say(self, sentence: str) -> None:
        sys.stderr.write(sentence + "\n")
        sys.stderr.flush()


def _duration(seconds: float) -> str:
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
