"""Llama checkpoints with random weights, generated once into the user's cache folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lamina.model.cache import cache_folder

SEED = 20_000
STD = 0.02
ITEM_BYTES = 2
"""The size of a number: weights, keys and values are bfloat16."""
MAX_CONTEXT = 16_384


@dataclass(frozen=True, slots=True)
class RandomLlama:
    """The shape of a Llama with grouped-query attention and an untied output projection, in bfloat16."""

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one step reads: all except the embeddings, of which it reads one row per token."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.hidden * self.ffn
        return ITEM_BYTES * (self.layers * layer + self.hidden * self.vocabulary)

    @property
    def file_bytes(self) -> int:
        return self.weight_bytes + ITEM_BYTES * self.hidden * self.vocabulary

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * ITEM_BYTES * self.layers * self.kv_heads * self.head_dim

    def step_bytes(self, batch: int, context: int) -> int:
        """Return the bytes that one step of ``batch`` sequences must read: all weights, and all keys and values."""
        return self.weight_bytes + batch * context * self.kv_bytes_per_token


MODELS = {
    model.name: model
    for model in (
        RandomLlama("T", hidden=128, ffn=384, layers=2, heads=4, kv_heads=2, head_dim=32, vocabulary=512),
        RandomLlama("S", hidden=1024, ffn=3072, layers=12, heads=16, kv_heads=4, head_dim=64, vocabulary=8192),
        RandomLlama("M", hidden=2048, ffn=8192, layers=16, heads=32, kv_heads=8, head_dim=64, vocabulary=32_000),
    )
}
"""The models by name. T is a toy, for trying whether everything works."""


def checkpoint(model: RandomLlama) -> Path:
    """Return the checkpoint directory of ``model``, generated if it is missing; every machine gets the same weights."""
    shape = "-".join(str(value) for value in asdict(model).values())
    folder = cache_folder("checkpoints") / f"{shape}-{SEED}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            _write(model, made)
            if not folder.exists():
                shutil.move(made, folder)
    return folder


def _write(model: RandomLlama, folder: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocabulary,
        "max_position_embeddings": MAX_CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(_weights(model), folder / "model.safetensors", metadata={"format": "pt"})


def _weights(model: RandomLlama) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * STD).to(torch.bfloat16)

    def ones() -> Tensor:
        return torch.ones(model.hidden, dtype=torch.bfloat16)

    q_dim, kv_dim = model.heads * model.head_dim, model.kv_heads * model.head_dim
    weights = {
        "model.embed_tokens.weight": normal(model.vocabulary, model.hidden),
        "model.norm.weight": ones(),
        "lm_head.weight": normal(model.vocabulary, model.hidden),
    }
    for i in range(model.layers):
        layer = {
            "input_layernorm": ones(),
            "self_attn.q_proj": normal(q_dim, model.hidden),
            "self_attn.k_proj": normal(kv_dim, model.hidden),
            "self_attn.v_proj": normal(kv_dim, model.hidden),
            "self_attn.o_proj": normal(model.hidden, q_dim),
            "post_attention_layernorm": ones(),
            "mlp.gate_proj": normal(model.ffn, model.hidden),
            "mlp.up_proj": normal(model.ffn, model.hidden),
            "mlp.down_proj": normal(model.hidden, model.ffn),
        }
        weights |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    return weights
