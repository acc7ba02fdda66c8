"""The compute node of benchmarks does not take prompts through the slices, and decodes all the same."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from lamina.bench.filled import FIRST_TOKEN
from tests import harness
from tests.families import FAMILIES

PROMPT = list(range(40, 90))


def test_prompts_are_filled_in_at_random(tmp_path: Path) -> None:
    """Whatever is asked, the first token is the same; what follows is decoded behind what was filled in."""
    path = FAMILIES["llama"].save(tmp_path / "checkpoint")
    (port,) = harness.free_ports(1)
    memory = harness.start_memory(tmp_path, port)
    config = harness.write_config(tmp_path, path, [port])
    command = [sys.executable, "-m", "lamina.bench.filled", str(config.file), "c0"]

    async def main() -> list[list[int]]:
        async with harness.client(config, deadline_s=60) as client:

            async def ready() -> bool:
                return (await client.status()).state == "ready"

            await harness.eventually(ready, 60)
            answers = await asyncio.gather(
                *(client.generate([token, *PROMPT], max_tokens=8, share_prefix=False) for token in range(4))
            )
            return [answer.tokens for answer in answers]

    with harness.running(memory), subprocess.Popen(command, stderr=subprocess.DEVNULL) as filled:
        try:
            answers = asyncio.run(asyncio.wait_for(main(), 90))
        finally:
            filled.kill()

    assert [answer[0] for answer in answers] == [FIRST_TOKEN] * 4
    assert all(len(answer) == 8 for answer in answers)
