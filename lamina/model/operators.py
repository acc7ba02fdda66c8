"""The two opaque operators of a captured graph: attention and mixture-of-experts.

``transformers`` can replace attention, its mask, and the experts of a model by name. ``install`` registers
replacements under the name ``lamina``. Attention becomes an operator without an implementation, because the graph is
cut there. Experts become an operator that reads only the experts to which tokens are routed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lamina.errors import UnsupportedModelError

NAME = "lamina"

# Arguments of attention functions that do not change the result in evaluation.
_HARMLESS = frozenset(
    {
        "dropout",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "use_cache",
    }
)


@torch.library.custom_op("lamina::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, window: int, softcap: float) -> Tensor:
    """Compute causal attention in one layer: q [T, Hq, Dk], k [T, Hkv, Dk], v [T, Hkv, Dv] -> o [T, Hq, Dv].

    ``window`` and ``softcap`` are 0 in a layer that has none.
    """
    raise AssertionError("the attention operator marks where the graph is cut and is never executed")


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, window: int, softcap: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


@torch.library.custom_op("lamina::experts", mutates_args=())
def experts(
    hidden: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    transposed: bool,
) -> Tensor:
    """Compute a mixture of experts, reading only the experts to which tokens are routed.

    hidden [T, d]; chosen [T, K] expert numbers; weights [T, K]; up [E, 2i, d] or [E, i, d]; down [E, d, i]
    (both with the last two dimensions swapped when ``transposed``); biases [E, rows of the product] or None.
    ``activation`` names an entry made by ``_activation``. The result is [T, d]. Experts are visited in ascending
    order, like in the library's own loop, so that sums round equally.
    """
    act = _activations[activation]
    out = torch.zeros_like(hidden)
    for expert in torch.unique(chosen).tolist():
        tokens, slots = torch.where(chosen == expert)
        inner = act(_linear(hidden[tokens], up[expert], up_bias, expert, transposed))
        outer = _linear(inner, down[expert], down_bias, expert, transposed)
        out.index_add_(0, tokens, (outer * weights[tokens, slots, None]).to(out.dtype))
    return out


@experts.register_fake
def _(
    hidden: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    transposed: bool,
) -> Tensor:
    return torch.empty_like(hidden)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, expert: int, transposed: bool) -> Tensor:
    return nn.functional.linear(x, weight.T if transposed else weight, None if bias is None else bias[expert])


# The activations of experts, between their two products. A graph can hold only strings, so it names the entry.
_activations: dict[str, Callable[[Tensor], Tensor]] = {}


def _activation(module: nn.Module) -> str:
    """Register the activation (and gate) of an experts module; equal modules share one entry."""
    kind = type(module)
    settings = sorted((k, v) for k, v in vars(module).items() if isinstance(v, (int, float, str)))
    act = type(getattr(module, "act_fn", None)).__name__
    name = f"{kind.__module__}.{kind.__qualname__}:{act}:{settings}"
    _activations[name] = module._apply_gate if module.has_gate else module.act_fn  # type: ignore[assignment]
    return name


@dataclass(frozen=True, slots=True)
class _CausalMask:
    """A causal mask, perhaps limited to a window; the mask interface hands it to attention instead of a tensor."""

    window: int | None


def _mask(
    *,
    allow_is_bidirectional_skip: bool | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **_: object,
) -> _CausalMask:
    # Only the library's bidirectional mask functions pass this argument.
    if allow_is_bidirectional_skip is not None:
        raise UnsupportedModelError("the model uses bidirectional attention; Lamina decodes causal models only")
    if use_vmap:
        raise UnsupportedModelError(
            "the model adds a function of its own to its attention mask, which Lamina cannot represent"
        )
    return _CausalMask(local_size)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Replace the library's attention: query [1, Hq, T, Dk], key [1, Hkv, T, Dk], value [1, Hkv, T, Dv]."""
    where = f"attention {type(module).__name__}"
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise UnsupportedModelError(f"{where} has no layer_idx, so its KV cache cannot be addressed")
    if not isinstance(attention_mask, _CausalMask):
        raise UnsupportedModelError(f"{where} in layer {layer} uses a mask that is not the library's causal mask")
    if not getattr(module, "is_causal", True):
        raise UnsupportedModelError(f"{where} in layer {layer} is not causal; Lamina decodes causal models only")
    # The mask determines what attention sees, and the argument only repeats it. Chunked attention has only the mask.
    if attention_mask.window not in (None, sliding_window):
        raise UnsupportedModelError(
            f"{where} in layer {layer} is masked to {attention_mask.window} tokens but names {sliding_window} as its "
            "sliding window; Lamina can represent sliding windows, but no other local masks such as chunks"
        )
    for name, setting in others.items():
        if setting is not None and name not in _HARMLESS:
            feature = "attention sinks (s_aux)" if name == "s_aux" else f"the attention argument {name!r}"
            raise UnsupportedModelError(f"{where} in layer {layer} needs {feature}, which Lamina cannot represent yet")
    o = attention(
        _token_major(query),
        _token_major(key),
        _token_major(value),
        layer,
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        attention_mask.window or 0,
        float(softcap or 0.0),
    )
    return o.unsqueeze(0), None


def _token_major(x: Tensor) -> Tensor:
    """Convert [1, H, T, D] to [T, H, D]."""
    return x.transpose(1, 2)[0]


def _experts(module: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    if module.has_post_expert_norm:
        raise UnsupportedModelError(
            f"{type(module).__name__} normalises after each expert, which Lamina cannot represent"
        )
    up = "gate_up_proj" if module.has_gate else "up_proj"
    biases = [getattr(module, f"{name}_bias") if module.has_bias else None for name in (up, "down_proj")]
    out: Tensor = experts(
        hidden,
        chosen,
        weights,
        getattr(module, up),
        module.down_proj,
        *biases,
        _activation(module),
        bool(module.is_transposed),
    )
    return out


@functools.cache
def install() -> None:
    """Register the operators with ``transformers`` under the name ``lamina``, once per process."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
