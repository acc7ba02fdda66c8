"""Try every decoder of the installed ``transformers`` library over a cluster, and write down what came of it.

``python -m tests.sweep`` prints the table; with ``--write`` it also becomes docs/models.md. Model types as arguments
try only these.
"""

from __future__ import annotations

import random
import re
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from lamina.config import PipelineConfig
from lamina.errors import LaminaError
from lamina.sim.cluster import SimCluster
from tests.decoders import decoders, save_tiny
from tests.families import MAX_CONTEXT, VOCABULARY
from tests.oracle import Agreement, Oracle
from tests.sim.clusters import generate, make_config, open_real, simulate

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
EQUAL = "equal"
TOKENS = 32
MEMORY_NODES = 3
_random = random.Random(5)
PROMPTS = [[_random.randrange(1, VOCABULARY) for _ in range(length)] for length in (1, 9, 40, 300)]


@dataclass(frozen=True)
class Outcome:
    """What came of one model type: ``result`` is EQUAL, or the sentence that refuses it."""

    model_type: str
    architecture: str
    result: str


def attempt(model_type: str, agreement: Agreement) -> Outcome:
    """Decode with a tiny model of a type over one compute node and three memory nodes, and compare every token.

    AssertionError where a token differs, and any other error but a refusal is none of ours.
    """
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    with tempfile.TemporaryDirectory() as folder:
        path = save_tiny(model_type, Path(folder))
        try:
            facts = open_real(make_config(path)).facts
        except LaminaError as error:
            return Outcome(model_type, architecture, str(error).removeprefix(f"{path}: "))
        partition = "heads" if min(layer.kv_heads for layer in facts.layers) >= MEMORY_NODES else "requests"
        config = make_config(
            path,
            memory_nodes=MEMORY_NODES,
            pipeline=PipelineConfig(partition=partition),
            context=min(MAX_CONTEXT, facts.max_context),
        )
        answers = simulate(config, _answers)
        oracle = Oracle(path)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert len(answer) == TOKENS
            agreement.check(oracle, prompt, answer, f"{model_type}, prompt of {len(prompt)}")
    return Outcome(model_type, architecture, EQUAL)


async def _answers(cluster: SimCluster) -> list[list[int]]:
    async with cluster.client() as client:
        return await generate(client, PROMPTS, max_tokens=TOKENS)


def written() -> dict[str, Outcome]:
    """The outcomes in the document, by model type."""
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (.+) \|$", DOCUMENT.read_text(), re.MULTILINE)
    return {row[0]: Outcome(*row) for row in rows}


def write(outcomes: Iterable[Outcome]) -> None:
    """Bring the document up to date: the rows of ``outcomes``, and of no type that the library does not have."""
    names = decoders()
    known = (written() if DOCUMENT.exists() else {}) | {outcome.model_type: outcome for outcome in outcomes}
    rows = [known[name] for name in sorted(known) if name in names]
    equal = sum(row.result == EQUAL for row in rows)
    lines = [
        "# Models",
        "",
        "Every decoder of the `transformers` library, tried as a tiny random checkpoint over one compute node and",
        "three memory nodes. With *equal*, all tokens are those of `generate`. The others are refused as said here.",
        "",
        f"{equal} of {len(rows)} are equal with version {transformers.__version__}.",
        "`python -m tests.sweep --write` writes this page.",
        "",
        "| `model_type` | class | result |",
        "| --- | --- | --- |",
        *(f"| `{row.model_type}` | `{row.architecture}` | {row.result} |" for row in rows),
        "",
        "- With the rope types `dynamic` and `longrope`, the longest context is the original one. Beyond it the angles",
        "  of all tokens change, also of those whose keys lie in a cache.",
        "- `repetition_penalty` and the end tokens of `generation_config.json` have the effect that they have with",
        "  `generate`. Its other settings that change greedy tokens are refused by name. Settings of sampling are only",
        "  what the HTTP endpoint takes by default.",
    ]
    DOCUMENT.write_text("\n".join(lines) + "\n")


def main(arguments: list[str]) -> None:
    """Try the types among the arguments, or all."""
    torch.set_num_threads(1)  # tiny products are slower on several
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    agreement = Agreement()
    chosen = [name for name in arguments if not name.startswith("--")] or list(decoders())
    outcomes: list[Outcome] = []
    failed: list[str] = []
    for model_type in chosen:
        started = time.monotonic()
        try:
            outcomes.append(attempt(model_type, agreement))
            result = outcomes[-1].result
        except Exception as error:  # the sweep goes on, and ends with an error
            failed.append(model_type)
            result = f"FAILED: {type(error).__name__}: {error}"
        print(f"{model_type} ({time.monotonic() - started:.0f} s): {result}", flush=True)  # noqa: T201
    print(f"{agreement.tokens} tokens, {len(agreement.ties)} ties")  # noqa: T201
    if "--write" in arguments:
        write(outcomes)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
