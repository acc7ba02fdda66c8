"""dspy: a module with a signature, whose answer the adapter reads from text, or else from a JSON object."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import dspy


def _lm(server: SimpleNamespace, **more: Any) -> dspy.LM:
    given = {"model": f"openai/{server.model}", "api_base": server.url, "api_key": server.key, "cache": False}
    return dspy.LM(**(given | {"temperature": 0, "max_tokens": server.tokens, "num_retries": 0} | more))


def plain(server: SimpleNamespace) -> Any:
    lm = _lm(server)
    [text] = lm(server.question)
    usage = lm.history[-1]["usage"]
    return {"text": text, "prompt_tokens": usage["prompt_tokens"], "completion_tokens": usage["completion_tokens"]}


def structured(server: SimpleNamespace) -> Any:
    """The adapter asks for a schema that it makes of the signature, of models that it knows by name."""
    signature = dspy.Signature(
        {"question": (str, dspy.InputField()), "colour": (Literal["red", "green"], dspy.OutputField())}
    )
    with dspy.context(
        lm=_lm(server, model=f"openai/{server.known_model}", max_tokens=server.room), adapter=dspy.JSONAdapter()
    ):
        return {"colour": dspy.Predict(signature)(question=server.question).colour}


def wrong_model(server: SimpleNamespace) -> Any:
    return _lm(server, model="openai/absent")(server.question)
