"""Calls of the ``transformers`` library, without its output, and with its errors turned into one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lamina.errors import UnsupportedModelError
from lamina.model.cache import keep_inductor_private

_LONGEST_REASON = 300


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the library's progress bars and log lines, as a node logs one line per event of its own.

    The library imports what compiles, also where nothing is compiled, so the cache is made private here.
    """
    keep_inductor_private()
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
    """Call the library quietly, and turn its errors into an UnsupportedModelError "``path``: ``what``: reason".

    Lamina's own operators, which the library calls back, do not know the path; it is added to their errors here.
    """
    with quiet():
        try:
            yield
        except UnsupportedModelError as e:
            raise UnsupportedModelError(f"{path}: {e}") from e
        except Exception as e:
            reason = " ".join(str(e).split())[:_LONGEST_REASON] or type(e).__name__
            raise UnsupportedModelError(f"{path}: {what}: {reason}") from e
