"""Runs one client program as its users do. The Python of the client's environment runs this file.

``python -P drive.py DRIVER SERVER OUTPUT CASE ...`` calls functions of the file DRIVER. SERVER is JSON, and becomes the
argument of each; OUTPUT gets a JSON object with what each returned, or the names of the class of what it raised.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def main(driver: str, server: str, output: str, *cases: str) -> None:
    """Run the cases one after the other; one that fails does not end the others."""
    given = SimpleNamespace(**json.loads(server))
    spec = importlib.util.spec_from_file_location("driver", driver)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["driver"] = module  # some clients look up the module of a function
    spec.loader.exec_module(module)
    results = {case: _run(getattr(module, case), given) for case in cases}
    Path(output).write_text(json.dumps(results))


def _run(case: Any, server: SimpleNamespace) -> dict[str, Any]:
    try:
        value = case(server)
        if inspect.isawaitable(value):
            value = asyncio.run(_awaited(value))
    except Exception as e:
        names = [kind.__name__ for kind in type(e).__mro__]
        return {"raised": names, "message": str(e), "traceback": traceback.format_exc()}
    return {"value": value}


async def _awaited(value: Any) -> Any:
    return await value


if __name__ == "__main__":
    main(*sys.argv[1:])
