"""A cluster with `lamina serve` before it, and what its own client answers, with which the others are compared."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import lamina
from lamina.config import ClusterConfig
from lamina.demo.run import CHECKPOINT
from tests import harness

MODEL = "lamina-demo"
KNOWN_MODEL = "gpt-4o-mini"
"""Another name of it, by which some clients believe that it can do more."""
QUESTION = "Tell me about the little dog."
PROMPT = "Once upon a time there was a little"
CONTEXT = 16384
"""More than the demo model has learned. It says nonsense there, but it says it: some clients have long prompts."""
START_TIMEOUT_S = 180.0
TEMPLATE = """{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>
{% if message['content'] %}{{ message['content'] }}
{% endif %}{% for call in message.get('tool_calls') or [] %}<tool_call>
{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
</tool_call>
{% endfor %}{% endfor %}{% if tools %}<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
{% endif %}{% if add_generation_prompt %}<assistant>
{% endif %}"""
"""As those of many models: it puts texts together, and knows nothing of lists of parts."""


def save_checkpoint(folder: Path) -> Path:
    """The demo checkpoint, with a chat template and a long context."""
    shutil.copytree(CHECKPOINT, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    for file, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        facts = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(facts | {key: CONTEXT}))
    return folder


@dataclass
class Server:
    """A running cluster and its endpoint."""

    config: ClusterConfig
    checkpoint: Path
    port: int
    nodes: dict[str, harness.Node]

    @property
    def root(self) -> str:
        """The address without /v1."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """The address that clients of OpenAI's API are given."""
        return f"{self.root}/v1"

    def get(self, path: str) -> str:
        """The text at a path."""
        with urllib.request.urlopen(f"{self.root}{path}", timeout=10) as answer:  # noqa: S310 - our own server
            return str(answer.read().decode())

    def counters(self) -> dict[str, float]:
        """The counters of /metrics, by name and labels."""
        found = re.findall(r"^(\w+(?:\{.*\})?) (\S+)$", self.get("/metrics"), re.MULTILINE)
        return {name: float(value) for name, value in found}

    def wait(self) -> None:
        """Return when requests are taken."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                self.get("/ready")
                return
            assert time.monotonic() < deadline, self.nodes["serve"].log.read_text()[-2000:]
            time.sleep(0.1)

    def restart_front(self) -> None:
        """Kill the front if it still lives, and start it again; the endpoint finds it."""
        self.nodes["c0"].kill()
        self.nodes["c0"] = harness.start_node(self.config, "c0")
        asyncio.run(harness.ready(self.config, self.nodes["c0"]))
        self.wait()

    @functools.cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.checkpoint)

    @functools.cached_property
    def closing(self) -> dict[int, float]:
        """A bias for tokens with which objects and answers end, for where the model would go on for ever."""
        return dict.fromkeys(map(self.tokenizer.convert_tokens_to_ids, ("}", "</s>")), 100.0)

    def chat_ids(self, question: str) -> list[int]:
        """The token ids of a chat, as transformers makes them."""
        ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        return [int(token) for token in ids]

    def answer(self, prompt: list[int], tokens: int, **settings: Any) -> lamina.Completion:
        """What Lamina's own client gets for the same token ids."""
        with lamina.Client(self.config.front.address) as client:
            return client.generate(prompt, max_tokens=tokens, **settings)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Server]:
    """A compute node, a memory node and the endpoint."""
    checkpoint = save_checkpoint(folder / MODEL)
    # The programs use the same cores as the nodes, which are silent for seconds then.
    wiring = replace(harness.default, peer_timeout=30.0)
    config = harness.write_config(
        folder, checkpoint, harness.free_ports(1), memory=256 << 20, wiring=wiring, start_timeout=START_TIMEOUT_S
    )
    nodes = {node.name: harness.start_node(config, node.name) for node in config.node}
    [port] = harness.free_ports(1)
    names = ("--served-model-name", MODEL, "--served-model-name", KNOWN_MODEL)
    nodes["serve"] = harness.start(folder / "serve.log", "serve", str(config.file), "--port", str(port), *names)
    server = Server(config, checkpoint, port, nodes)
    try:
        server.wait()
        yield server
    finally:
        for node in nodes.values():  # the front may be another one by now
            node.kill()
