"""How the ``transformers`` library is called: quietly, and with whatever it raises turned into one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lamina.errors import LaminaError, UnsupportedModelError

_LONGEST_REASON = 300


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the library's progress bars and log lines: a node logs one line per event, and checks for itself."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Call the library quietly; what it raises becomes an UnsupportedModelError that begins with ``what``."""
    with quiet():
        try:
            yield
        except LaminaError:
            raise
        except Exception as e:
            reason = " ".join(str(e).split())[:_LONGEST_REASON] or type(e).__name__
            raise UnsupportedModelError(f"{what}: {reason}") from e
