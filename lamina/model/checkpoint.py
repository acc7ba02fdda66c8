"""A checkpoint directory as Hugging Face writes it: config.json, safetensors, tokenizer."""

from __future__ import annotations

import hashlib
import json
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
    _generation(path)
    check_tokenizer(path)


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "begin_suppress_tokens": (None, []),
    "bad_words_ids": (None, []),
    "encoder_repetition_penalty": (None, 1),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0),
    "sequence_bias": (None, {}, []),
    "stop_strings": (None, [], ""),
    "suppress_tokens": (None, []),
    "watermarking_config": (None,),
}
"""Settings of generation_config.json with which `generate` chooses other tokens, also greedily, and the values with
which it does not."""


def _generation(path: Path) -> dict[str, Any] | None:
    """Return what generation_config.json says, if there is one. UnsupportedModelError names a setting that Lamina does
    not follow."""
    file = path / "generation_config.json"
    if not is_file(file):
        return None
    raw: dict[str, Any] = read_json(file)
    for name, neutral in _NEUTRAL.items():
        if raw.get(name) not in neutral:
            raise UnsupportedModelError(
                f"{file}: {name} is {json.dumps(raw[name])}, which changes tokens in a way that Lamina cannot follow; "
                "remove it to serve the model without it"
            )
    return raw


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
        ignored = f" ignored={INDEX}" if files.index != index and is_file(index) else ""
        log.info("event=weights path=%s files=%r%s", self.path, str(files), ignored)
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
        With LongRoPE it is the original context, as beyond it all angles change.
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
        original = [
            int(rope["original_max_position_embeddings"])
            for rope in rope_parameters(text)
            if rope.get("rope_type") == "longrope"
        ]
        return min([min(extended, default=limit), *original])

    @cached_property
    def vocabulary(self) -> int:
        """The size of the vocabulary; all token ids are smaller."""
        size: int = self.config.get_text_config().vocab_size
        return size

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """The token ids that end a sequence, from generation_config.json if it exists, else from config.json.

        As with `generate`, none do if generation_config.json names none.
        """
        generation = _generation(self.path)
        if generation is None:
            ids = getattr(self.config.get_text_config(), "eos_token_id", None)
        else:
            ids = generation.get("eos_token_id")
        if ids is None:
            return frozenset()
        return frozenset(ids if isinstance(ids, list) else [ids])

    @cached_property
    def repetition_penalty(self) -> float:
        """What generation_config.json says, else 1."""
        return float((_generation(self.path) or {}).get("repetition_penalty") or 1.0)
