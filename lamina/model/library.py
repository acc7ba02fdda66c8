"""How the ``transformers`` library is called: quietly, and with whatever it raises turned into one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lamina.errors import UnsupportedModelError

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
def refusing(path: Path, what: str) -> Iterator[None]:
    """Call the library quietly; what it raises becomes an UnsupportedModelError "``path``: ``what``: its reason".

    Our own operators, which the library calls back, know no path: their refusals get it here.
    """
    with quiet():
        try:
            yield
        except UnsupportedModelError as e:
            raise UnsupportedModelError(f"{path}: {e}") from e
        except Exception as e:
            reason = " ".join(str(e).split())[:_LONGEST_REASON] or type(e).__name__
            raise UnsupportedModelError(f"{path}: {what}: {reason}") from e
