"""A checkpoint directory as Hugging Face writes it: config.json, safetensors, tokenizer."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lamina.errors import UnsupportedModelError
from lamina.model.files import (
    DTYPES,
    INDEX,
    WeightFiles,
    check_tokenizer,
    find_weights,
    is_file,
    opened,
    read_config,
    read_json,
    stored_dtype,
)
from lamina.model.library import refusing

log = logging.getLogger("lamina.model")

# How many numbers of each tensor the fingerprint reads; they lie within one page of the file.
_SAMPLED = 64


def check_checkpoint(path: Path) -> None:
    """Check that a model can be loaded from the directory ``path``, as far as its files tell, in a part of a second.

    A CheckpointError says what is wrong: no directory, no right to read it, a damaged or missing file, a tensor that
    the index promises and no file holds, a tokenizer that cannot be read. Neither torch nor transformers is imported,
    so features of the model that Lamina does not support are found only when it is captured.
    """
    raw = read_config(path)
    if not isinstance(raw.get("model_type"), str):
        raise UnsupportedModelError(f"{path / 'config.json'}: model_type is missing, so the model is not known")
    find_weights(path, raw).tensors()
    generation = path / "generation_config.json"
    if is_file(generation):
        read_json(generation)
    check_tokenizer(path)


def rope_parameters(text: Any) -> list[dict[str, Any]]:
    """Return the rope parameters of a configuration of the library: one, or one for each type of layers."""
    if not getattr(text, "rope_parameters", None):
        return []
    text.standardize_rope_params()  # as every model does before it uses them; this finds the original context
    ropes: dict[str, Any] = text.rope_parameters
    return [rope for rope in ropes.values() if isinstance(rope, dict)] or [ropes]


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint directory, opened and checked, before any tensor is read.

    ``config`` is the library's configuration object, and ``dtype`` the data type that the model runs in.
    """

    path: Path
    config: Any
    dtype: str

    @classmethod
    def open(cls, path: str | Path, dtype: str | None = None) -> Checkpoint:
        """Read config.json in ``path``. ``dtype`` None selects the type in which the checkpoint is stored."""
        from transformers import AutoConfig

        path = Path(path)
        raw = read_config(path)
        kind = raw.get("model_type", "missing")
        with refusing(path / "config.json", f"the transformers library cannot read this model_type {kind!r}"):
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        chosen = dtype or str(config.dtype or stored_dtype(path, raw)).removeprefix("torch.")
        if chosen not in DTYPES:
            raise UnsupportedModelError(
                f"{path}: data type {chosen!r} is not supported; choose one of {', '.join(DTYPES)}"
            )
        return cls(path, config, chosen)

    @cached_property
    def weight_files(self) -> WeightFiles:
        """The files that hold the weights; the log names them once."""
        files = find_weights(self.path, read_json(self.path / "config.json"))
        index = self.path / INDEX
        passed = f" instead={INDEX}" if files.index != index and is_file(index) else ""
        log.info("event=weights path=%s files=%r%s", self.path, str(files), passed)
        return files

    @cached_property
    def tensor_files(self) -> dict[str, Path]:
        """The safetensors file of each tensor."""
        return self.weight_files.tensors()

    @contextmanager
    def tensors(self) -> Iterator[dict[str, Any]]:
        """Yield for each tensor a slice of its file, which is read lazily; it is valid inside the ``with`` block."""
        with ExitStack() as stack:
            handles: dict[Path, Any] = {}
            slices = {}
            for name, path in self.tensor_files.items():
                if path not in handles:
                    handles[path] = stack.enter_context(opened(path, "pt"))
                slices[name] = handles[path].get_slice(name)
            yield slices

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the configuration and of every tensor's name, type, shape and first numbers.

        It is equal for copies of a model, also if they are sharded differently, and differs for fine-tuned models. It
        does not cover all weights, because reading them takes as long as loading them.
        """
        import torch

        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        with self.tensors() as tensors:
            for name, tensor in sorted(tensors.items()):
                shape = tensor.get_shape()
                digest.update(f"{name} {tensor.get_dtype()} {shape}\n".encode())
                sample = tensor[(*[slice(1)] * (len(shape) - 1), slice(_SAMPLED))] if shape else tensor[...]
                digest.update(sample.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]

    @cached_property
    def max_context(self) -> int:
        """The longest context, in tokens, that the model supports.

        With YaRN that is ``factor`` times the original context. Checkpoints differ in whether max_position_embeddings
        is the original context or the extended one, so it does not count where rope parameters give the original.
        """
        text = self.config.get_text_config()
        limit = getattr(text, "max_position_embeddings", None)
        if not isinstance(limit, int) or limit < 1:
            raise UnsupportedModelError(f"{self.path / 'config.json'}: max_position_embeddings is missing")
        extended = [
            int(rope["factor"] * rope["original_max_position_embeddings"])
            for rope in rope_parameters(text)
            if rope.get("rope_type") == "yarn" and rope.get("factor")
        ]
        return min(extended, default=limit)

    @cached_property
    def vocabulary(self) -> int:
        """The size of the vocabulary; all token ids are smaller."""
        size: int = self.config.get_text_config().vocab_size
        return size

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """The token ids that end a sequence, from generation_config.json if it exists, else from config.json."""
        generation = self.path / "generation_config.json"
        raw = read_json(generation) if is_file(generation) else {}
        ids = raw.get("eos_token_id", getattr(self.config.get_text_config(), "eos_token_id", None))
        if ids is None:
            return frozenset()
        return frozenset(ids if isinstance(ids, list) else [ids])
