"""What the scripts in this folder share. They run under the Python of a peer's own environment, without Lamina."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Answer = dict[str, Any]


def serve(start: Callable[[], tuple[Answer, Callable[..., Answer]]]) -> None:
    """Print the description that ``start`` returns, then answer each line of JSON on standard input with a line.

    ``start`` also returns a function, which is called with the values of each line and returns the answer. An error
    becomes the answer {"failed": why}. Everything else that is printed goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: Answer) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        about, measure = start()
    except BaseException as e:
        say({"failed": _why(e)})
        raise
    say(about)
    for line in sys.stdin:
        try:
            answer = measure(**json.loads(line))
        except Exception as e:
            answer = {"failed": _why(e)}
        say(answer)


def _why(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
