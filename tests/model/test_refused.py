"""What cannot be represented is refused by name, before any weight is read."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from lamina.errors import UnsupportedModelError
from lamina.model.capture import capture
from lamina.model.checkpoint import Checkpoint

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
REFUSED = {
    "state space": ("mamba", {}, r"layers of type \w+ cannot be represented"),
    "hybrid": ("jamba", {"num_experts": 2}, r"layers of type linear_attention"),
    "linear attention": ("qwen3_next", {"num_experts": 4}, r"layers of type linear_attention"),
    "encoder-decoder": ("t5", {}, r"t5 is an encoder-decoder"),
    "bidirectional": ("bert", {"is_decoder": False}, r"not causal|bidirectional attention"),
    "no attention interface": ("bloom", {}, r"BloomForCausalLM does not route attention"),
    "no language model": ("vit", {}, r"vit is not a causal language model"),
    "a mask of its own": ("doge", {}, r"DogeForCausalLM changes its attention mask by itself"),
    "sparse attention": ("deepseek_v32", {"num_key_value_heads": 4}, r"layers of type indexed_attention"),
}


@pytest.mark.parametrize("feature", REFUSED)
def test_feature_is_refused_by_name(feature, tmp_path):
    """One sentence that names the directory and the feature; never a model that decodes wrongly."""
    model_type, changes, message = REFUSED[feature]
    defaults = AutoConfig.for_model(model_type).to_dict()
    known = {name: value for name, value in SMALL.items() if name in defaults}
    AutoConfig.for_model(model_type, **{**known, **changes}).save_pretrained(tmp_path)

    with pytest.raises(UnsupportedModelError, match=message) as caught:
        capture(Checkpoint.open(tmp_path))
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)
