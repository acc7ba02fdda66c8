"""The opaque operators of a captured graph: attention and mixture-of-experts.

``transformers`` can replace attention, its mask, and the experts of a model by name. ``install`` registers
replacements under the name ``lamina``. Attention becomes an operator without an implementation, because the graph is
cut there. Experts become an operator that reads only the experts to which tokens are routed.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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
        "sliding_window",  # the mask says it, too
        "use_cache",
    }
)


@torch.library.custom_op("lamina::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int, chunk: int, softcap: float
) -> Tensor:
    """Compute causal attention: q [T, Hq, Dk], k [T, Hkv, Dk], v [T, Hkv, Dv], sinks [Hq] -> o [T, Hq, Dv].

    ``window``, ``chunk`` and ``softcap`` are 0 where there is none.
    """
    raise AssertionError("the attention operator marks where the graph is cut and is never executed")


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int, chunk: int, softcap: float
) -> Tensor:
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


@torch.library.custom_op("lamina::module", mutates_args=())
def module_of_experts(hidden: Tensor, chosen: Tensor, weights: Tensor, parameters: list[Tensor], name: str) -> Tensor:
    """Run the module ``name`` of the library with ``parameters``, in the order in which it names them.

    hidden [..., d]; chosen [T, K] expert numbers; weights [T, K]. The result has the shape of ``hidden``.
    """
    owner = _modules[name]
    own = dict(zip([name for name, _ in owner.named_parameters()], parameters, strict=True))
    # The library does not promise a value of its own.
    out: Tensor = torch.func.functional_call(owner, own, (hidden, chosen, weights))
    return out.clone()


@module_of_experts.register_fake
def _(hidden: Tensor, chosen: Tensor, weights: Tensor, parameters: list[Tensor], name: str) -> Tensor:
    return torch.empty_like(hidden)


_modules: dict[str, nn.Module] = {}


def hide_experts(model: nn.Module) -> None:
    """Make one operator of each module of experts that the experts interface of the library does not know.

    Its code runs as it is, with a loop over the experts in use, which no graph can hold.
    """
    for part in model.modules():
        named_so = type(part).__name__.endswith("Experts") and not hasattr(part, "has_gate")
        if named_so and len(inspect.signature(part.forward).parameters) == 3:
            settings = [(type(p).__name__, [s for s in vars(p).items() if _is_plain(s[1])]) for p in part.modules()]
            shapes = [(name, tuple(parameter.shape)) for name, parameter in part.named_parameters()]
            name = f"{type(part).__module__}:{settings}:{shapes}"
            _modules.setdefault(name, copy.copy(part))
            part.forward = functools.partial(_run_hidden, part, name)


def _is_plain(value: object) -> bool:
    return isinstance(value, (int, float, str))


def _run_hidden(part: nn.Module, name: str, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    out: Tensor = module_of_experts(hidden, chosen, weights, list(part.parameters()), name)
    return out


@dataclass(frozen=True, slots=True)
class CausalMask:
    """A causal mask, perhaps limited to a window or to chunks; the mask interface hands it to attention instead of a
    tensor."""

    window: int = 0
    chunk: int = 0


def _mask(
    *,
    mask_function: Callable[..., object],
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    **_: object,
) -> CausalMask:
    # Only the library's bidirectional mask functions pass this argument.
    if allow_is_bidirectional_skip is not None:
        raise UnsupportedModelError("the model uses bidirectional attention; Lamina decodes causal models only")
    if use_vmap:
        raise UnsupportedModelError(
            "the model adds a function of its own to its attention mask, which Lamina cannot represent"
        )
    sizes = {"window": 0, "chunk": 0}
    for kind, values in _conditions(mask_function):
        if kind == "sliding_window_overlay":
            sizes["window"] = values["sliding_window"]
        elif kind == "chunked_overlay":
            sizes["chunk"] = values["chunk_size"]
        elif kind not in ("causal_mask_function", "packed_sequence_mask_function"):
            raise UnsupportedModelError(f"the attention mask of the model uses {kind}, which Lamina cannot represent")
    return CausalMask(**sizes)


def _conditions(function: Callable[..., object]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the name and the settings of each function of the library of which a mask is the intersection.

    What tells packed sequences apart is among them, and plays no part where the cache knows the sequences.
    """
    kind = function.__qualname__.partition(".")[0]
    values = inspect.getclosurevars(function).nonlocals
    if kind == "and_masks":
        for part in values["mask_functions"]:
            yield from _conditions(part)
    elif kind == "remap_positions_for_packed_sequence":
        yield from _conditions(values["mask_function"])
    else:
        yield kind, values


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Replace the library's attention: query [1, Hq, T, Dk], key [1, Hkv, T, Dk], value [1, Hkv, T, Dv]."""
    where = f"attention {type(module).__name__}"
    if isinstance(layer := getattr(module, "layer_idx", None), int):
        where += f" in layer {layer}"
    if not isinstance(attention_mask, CausalMask):
        raise UnsupportedModelError(f"{where} uses a mask that is not the library's causal mask")
    if not getattr(module, "is_causal", True):
        raise UnsupportedModelError(f"{where} is not causal; Lamina decodes causal models only")
    for name, setting in others.items():
        if setting is not None and name not in _HARMLESS:
            raise UnsupportedModelError(f"{where} needs the argument {name!r}, which Lamina cannot represent")
    o = attention(
        _token_major(query),
        _token_major(key),
        _token_major(value),
        s_aux,
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        attention_mask.window,
        attention_mask.chunk,
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
