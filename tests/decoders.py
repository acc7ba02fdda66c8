"""A tiny random checkpoint of every causal language model of the installed ``transformers`` library.

The settings are the library's defaults, made small by the names that families share; what does not fit into that is
written down for the family. All have several layers, and windows and chunks shorter than the prompts of the tests.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from tests.families import MAX_CONTEXT, VOCABULARY, randomise

_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "d_model": 96,
    "n_embd": 96,
    "dim": 96,
    "embedding_size": 96,
    "word_embed_proj_dim": 96,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "ffn_dim": 128,
    "ffn_hidden_size": 128,
    "d_ff": 128,
    "n_inner": 128,
    "num_hidden_layers": 3,
    "num_layers": 3,
    "n_layer": 3,
    "n_layers": 3,
    "num_attention_heads": 6,
    "num_heads": 6,
    "n_head": 6,
    "n_heads": 6,
    "attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": MAX_CONTEXT,
    "n_positions": MAX_CONTEXT,
    "n_ctx": MAX_CONTEXT,
    "max_seq_len": MAX_CONTEXT,
    "sliding_window": 16,
    "attention_chunk_size": 32,
    "num_experts": 6,
    "n_routed_experts": 6,
    "num_local_experts": 6,
    "moe_num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "rotary_dim": 8,
    "first_k_dense_replace": 1,
    "bos_token_id": 0,
    "pad_token_id": 0,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "window_size": 16,
    "moe_layer_start_index": 1,
}

_ENCODERS = "bert$|^bert|bertweet|roberta|camembert|ernie$|electra|data2vec|roformer|trocr|xmod|big_bird|xlnet|xlm$"
"""Types that are encoders, and decoders only by a setting."""
_LATENT: dict[str, Any] = {"num_key_value_heads": 6, "head_dim": None}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "codegen": {"n_head": 4, "n_embd": 64},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2, "head_dim": 8},
    "dbrx": {"attn_config": {"kv_n_heads": 3, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "gemma4_unified_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [32, 64]},
    "zamba": {"num_hidden_layers": 18, "layer_types": None},
    "zamba2": {"num_hidden_layers": 54, "layer_types": None},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}},
    },
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"]},
    "nemotron_h": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "moe", "full_attention", "mlp"]},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 24},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 24},
    "mamba2": {"num_heads": 8, "head_dim": 24},
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "llama4_text": {"no_rope_layers": [1, 0, 1], "floor_scale": 16},
    "dots1": {"n_shared_experts": 1},
    "diffllama": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
}
"""What a family needs besides; None leaves the library's default."""


def decoders() -> dict[str, str]:
    """The class of each causal language model of the library, by model type: of all that consist of one decoder."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = {}
    for model_type, name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()):
        config = CONFIG_MAPPING[model_type]
        wraps = set(config.sub_configs) - {"attn_config", "ffn_config"}
        if not (wraps or getattr(config, "is_encoder_decoder", False) or re.search(_ENCODERS, model_type)):
            found[model_type] = name
    return found


def tiny_config(model_type: str) -> Any:
    """The configuration of a tiny model."""
    from transformers import AutoConfig

    default = AutoConfig.for_model(model_type)
    known = default.to_dict()
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or []))
    special = {**(_LATENT if "kv_lora_rank" in known else {}), **_OF_FAMILY.get(model_type, {})}
    settings = {**{name: value for name, value in _SMALL.items() if name in known}, **special}
    name = default.attribute_map.get("layer_types", "layer_types")
    if kinds and not isinstance(getattr(type(default), name, None), property):
        settings.setdefault("layer_types", (kinds * 3)[:3])
    config = AutoConfig.for_model(model_type, **{name: v for name, v in settings.items() if v is not None})
    config.eos_token_id = None
    return config


def save_tiny(model_type: str, path: Path, seed: int = 0) -> Path:
    """Write the checkpoint of a tiny model with random weights into ``path``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32).eval()
    randomise(model, seed)
    model.save_pretrained(path)
    return path
