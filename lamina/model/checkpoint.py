"""A checkpoint directory as Hugging Face writes it: config.json, safetensors, tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lamina.errors import CheckpointError, UnsupportedModelError
from lamina.model.library import refusing

DTYPES = ("float32", "bfloat16", "float16")

# How many numbers of each tensor the fingerprint reads; they lie within one page of the file.
_SAMPLED = 64


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
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such checkpoint directory")
        raw = _read_json(path / "config.json")
        if quantization := raw.get("quantization_config"):
            raise UnsupportedModelError(
                f"{path / 'config.json'}: quantization_config (method {quantization.get('quant_method', 'unknown')!r}) "
                f"is not supported; use a checkpoint with weights in one of {', '.join(DTYPES)}"
            )
        kind = raw.get("model_type", "missing")
        with refusing(path / "config.json", f"the transformers library cannot read this model_type {kind!r}"):
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        chosen = dtype or str(config.dtype or "float32").removeprefix("torch.")
        if chosen not in DTYPES:
            raise UnsupportedModelError(
                f"{path}: data type {chosen!r} is not supported; choose one of {', '.join(DTYPES)}"
            )
        return cls(path, config, chosen)

    @cached_property
    def tensor_files(self) -> dict[str, Path]:
        """The safetensors file of each tensor, from the file itself or from the index of a sharded checkpoint."""
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise CheckpointError(f"{index}: expected a weight_map from tensor names to file names")
            files = {name: self.path / file for name, file in weight_map.items()}
            for file in sorted(set(files.values())):
                if not file.is_file():
                    raise CheckpointError(f"{file}: listed in {index.name} but missing")
            return files
        single = self.path / "model.safetensors"
        if not single.is_file():
            other = min((p.name for p in self.path.glob("*.bin")), default=None)
            hint = f"; {other} is a pickle, which Lamina never reads; convert it to safetensors" if other else ""
            raise CheckpointError(
                f"{self.path}: neither model.safetensors nor model.safetensors.index.json found{hint}"
            )
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single)

    @contextmanager
    def tensors(self) -> Iterator[dict[str, Any]]:
        """Yield for each tensor a slice of its file, which is read lazily; it is valid inside the ``with`` block."""
        from safetensors import SafetensorError

        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            slices = {}
            for name, path in self.tensor_files.items():
                if path not in opened:
                    opened[path] = stack.enter_context(_opened(path))
                try:
                    slices[name] = opened[path].get_slice(name)
                except SafetensorError as e:
                    raise CheckpointError(f"{path}: tensor {name!r} is in the index but not in the file") from e
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
        """The longest context, in tokens, that the model supports."""
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(limit, int) or limit < 1:
            raise UnsupportedModelError(f"{self.path / 'config.json'}: max_position_embeddings is missing")
        return limit

    @cached_property
    def vocabulary(self) -> int:
        """The size of the vocabulary; all token ids are smaller."""
        size: int = self.config.get_text_config().vocab_size
        return size

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """The token ids that end a sequence, from generation_config.json if it exists, else from config.json."""
        generation = self.path / "generation_config.json"
        raw = _read_json(generation) if generation.exists() else {}
        ids = raw.get("eos_token_id", getattr(self.config.get_text_config(), "eos_token_id", None))
        if ids is None:
            return frozenset()
        return frozenset(ids if isinstance(ids, list) else [ids])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path}: not a readable safetensors file ({_first_line(e)}); it may be truncated") from e
    with handle as file:
        yield file


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as e:
        raise CheckpointError(f"{path}: missing") from e
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: not readable as JSON ({_first_line(e)})") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
