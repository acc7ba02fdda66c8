"""llm, the command line: models of a configuration file, as chat and as completion."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_LLM = str(Path(sys.executable).with_name("llm"))


def _prepare(server: SimpleNamespace, folder: str) -> dict[str, str]:
    models = [
        {"model_id": name, "model_name": model, "api_base": server.url, **more}
        for name, model, more in (
            ("chat", server.model, {"supports_schema": True, "supports_tools": True}),
            ("completion", server.model, {"completion": True}),
            ("absent", "absent", {}),
        )
    ]
    Path(folder, "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML
    return os.environ | {"LLM_USER_PATH": folder, "OPENAI_API_KEY": server.key}


def _run(server: SimpleNamespace, *words: str, text: str = "") -> Any:
    with tempfile.TemporaryDirectory() as folder:
        environment = _prepare(server, folder)
        begin = ["prompt", text or server.question, "-o", "temperature", "0"]
        more = [] if "max_tokens" in words else ["-o", "max_tokens", str(server.tokens)]
        done = subprocess.run(
            [_LLM, *begin, *more, *words], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        logs = subprocess.run([_LLM, "logs", "list", "--json"], env=environment, capture_output=True, check=True)
        entry = json.loads(logs.stdout)[0]
        return {
            "text": entry["response"],
            "prompt_tokens": entry["input_tokens"],
            "completion_tokens": entry["output_tokens"],
        }


def plain(server: SimpleNamespace) -> Any:
    return _run(server, "-m", "chat", "--no-stream")


def stream(server: SimpleNamespace) -> Any:
    answer = _run(server, "-m", "chat")
    return {"pieces": [answer.pop("text")], **answer}


def completion(server: SimpleNamespace) -> Any:
    return _run(server, "-m", "completion", text=server.prompt)


def structured(server: SimpleNamespace) -> Any:
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"]}
    schema["additionalProperties"] = False
    answer = _run(server, "-m", "chat", "--schema", json.dumps(schema), "-o", "max_tokens", str(server.room))
    return json.loads(answer["text"])


def wrong_model(server: SimpleNamespace) -> Any:
    return _run(server, "-m", "absent")


def broken_stream(server: SimpleNamespace) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        words = [_LLM, "prompt", server.question, "-m", "chat", "-o", "max_tokens", str(server.many)]
        process = subprocess.Popen(
            words, env=_prepare(server, folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.read(1)
        os.kill(server.victim, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        if process.returncode:
            raise RuntimeError(errors)
    return "the answer was complete"
