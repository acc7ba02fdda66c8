"""What the endpoint has to know of a checkpoint, read by a short-lived process.

Only the `transformers` library knows the tokenizers of all checkpoints, and it is large and imports torch. So a child
process makes the tokenizer, exactly as the front does, and prints it; the endpoint stays small and listens at once.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from lamina.errors import CheckpointError, LaminaError
from lamina.model.tokenizer import Tokenizer

TIMEOUT_S = 120.0


class Facts(Struct, frozen=True):
    """Describes a checkpoint."""

    context: int
    """The longest context of the model, in tokens."""
    vocabulary: int
    kv_numbers: int = 0
    """How many numbers the keys and values of one token have in all layers; 0 if the configuration does not tell."""
    tokenizer: str | None = None
    """The tokenizer in the format of the `tokenizers` library."""
    missing: str = ""
    """Why there is no tokenizer."""
    unknown: int | None = None
    """The token that stands for text that the vocabulary lacks."""
    special: dict[str, str] = {}
    """The texts of special tokens by their role, such as ``eos_token``."""
    chat_template: str | dict[str, str] | None = None
    """The template, or several by name."""
    sampling: dict[str, float | int] = {}
    """What the checkpoint recommends: values for fields of `lamina.wire.requests.Sampling`."""


class _Described:
    """Is to `Tokenizer` what the library's own object is."""

    def __init__(self, tokenizer: str, facts: Facts) -> None:
        from tokenizers import Tokenizer as Library

        self.backend_tokenizer = Library.from_str(tokenizer)
        self.unk_token_id = facts.unknown
        self.special_tokens_map = facts.special
        self.chat_template = facts.chat_template


async def read_facts(path: Path) -> Facts:
    """Read a checkpoint in another process. CheckpointError says what is wrong with it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "lamina.serve.facts",
        str(path),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    except BaseException as e:
        if process.returncode is None:
            process.kill()
            await process.wait()
        if isinstance(e, TimeoutError):
            raise CheckpointError(f"{path}: the tokenizer was not read within {TIMEOUT_S:g} s") from e
        raise
    if process.returncode:
        lines = err.decode(errors="replace").strip().splitlines()
        raise CheckpointError(lines[-1] if lines else f"{path}: its reader ended with status {process.returncode}")
    return msgspec.json.decode(out, type=Facts)


def make_tokenizer(path: Path, facts: Facts, context: int) -> Tokenizer:
    """Return the tokenizer that a checkpoint was found to have."""

    def read(_: Path) -> Any:
        if facts.tokenizer is None:
            raise ValueError(facts.missing)
        return _Described(facts.tokenizer, facts)

    return Tokenizer(path, context, read)


_RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def _collect(path: Path) -> Facts:
    """In the child: read everything with the library."""
    from lamina.model.checkpoint import Checkpoint
    from lamina.model.files import is_file, read_json
    from lamina.model.tokenizer import read_tokenizer, template_and_tokens

    checkpoint = Checkpoint.open(path)
    generation = path / "generation_config.json"
    raw = read_json(generation) if is_file(generation) else {}
    sampling = {name: raw[name] for name in _RECOMMENDED if isinstance(raw.get(name), int | float)}
    about: dict[str, Any] = {
        "context": checkpoint.max_context,
        "vocabulary": checkpoint.vocabulary,
        "sampling": sampling,
        "kv_numbers": _kv_numbers(checkpoint.config.get_text_config()),
    }
    try:
        library = read_tokenizer(path)
        template, special = template_and_tokens(library)
        return Facts(
            tokenizer=library.backend_tokenizer.to_str(),
            unknown=library.unk_token_id,
            special=special,
            chat_template=template,
            **about,
        )
    except Exception as e:
        return Facts(missing=" ".join(str(e).split()) or type(e).__name__, **about)


def _kv_numbers(config: Any) -> int:
    layers, heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    width = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // heads if heads else 0)
    groups = getattr(config, "num_key_value_heads", None) or heads
    return 2 * layers * groups * width if layers and groups and width else 0


def _main() -> None:
    sys.modules["torch"] = None  # type: ignore[assignment] # the library reads the same without it, seconds sooner
    try:
        facts = _collect(Path(sys.argv[1]))
    except LaminaError as e:
        sys.stderr.write(f"{' '.join(str(e).split())}\n")
        sys.exit(1)
    sys.stdout.buffer.write(msgspec.json.encode(facts))


if __name__ == "__main__":
    _main()
