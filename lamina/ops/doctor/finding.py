"""One line of ``lamina doctor``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from lamina.errors import LaminaError

State = Literal["ok", "none", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line: ``none`` is what is not there and not needed either, ``fail`` what will not work."""

    item: str
    state: State
    found: str
    do: str = ""
    """What to do about it."""


def guarded(item: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What ``check`` finds; a line about its error if it fails, as it may on systems that nobody thought of."""
    try:
        return list(check())
    except LaminaError as e:
        return [Finding(item, "fail", str(e))]
    except Exception as e:
        return [Finding(item, "warn", f"could not be found out: {type(e).__name__}: {e}")]
