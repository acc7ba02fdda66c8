"""One finding of ``lamina doctor``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from lamina.errors import LaminaError

State = Literal["ok", "none", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The result of one check: ``none`` means absent and not needed, ``fail`` that something will not work."""

    item: str
    state: State
    found: str
    do: str = ""
    """What the user should do."""


def guarded(item: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Return the findings of ``check``; if it fails, as it may on an unusual system, a finding about its error."""
    try:
        return list(check())
    except LaminaError as e:
        return [Finding(item, "fail", str(e))]
    except Exception as e:
        return [Finding(item, "warn", f"could not be determined: {type(e).__name__}: {e}")]
