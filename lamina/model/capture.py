"""Turn the module of a checkpoint into one graph of operators, without its weights.

The module is built and traced on the meta device, so that capturing takes a second and no memory for a model of any
size. The numbers of tokens T and of sampled rows S stay symbolic, so that one graph serves every batch.
"""

from __future__ import annotations

import io
import logging
import operator
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn

from lamina.attention import LayerShape
from lamina.errors import UnsupportedModelError
from lamina.model import operators
from lamina.model.checkpoint import Checkpoint
from lamina.model.library import refusing
from lamina.model.mixing import check_tokens_apart, use_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

aten = torch.ops.aten

# Sizes of the example inputs; any two different numbers above 1 do, as both dimensions are symbolic.
TRACED_TOKENS = 7
_TRACED_ROWS = 3

_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
"""Layers that are attention with a mask that memory nodes know."""
_FIXED_ROPES = {"dynamic": "lamina_scaled", "longrope": "lamina_short"}
"""Rotary angles that change for all tokens once a sequence is longer than the original context, and the names under
which they stay as they are below it: a key in a cache cannot change. `Checkpoint.max_context` ends there."""


@dataclass(frozen=True)
class Capture:
    """A captured model.

    ``graph`` computes the logits [1, S, vocabulary] from ``inputs`` (token ids [1, T], positions [1, T], sampled
    rows [S]) and ``tensors`` (its other placeholders, with the names of parameters or buffers). ``attentions``
    holds the attention nodes in the order of the trace, ``shapes`` the shape of each, and ``sinks`` the names of the
    parameters that are its sinks. ``module`` is the module on the meta device, which determines how the weights are
    loaded.
    """

    checkpoint: Checkpoint
    module: PreTrainedModel
    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    tensors: dict[fx.Node, str]
    attentions: tuple[fx.Node, ...]
    shapes: tuple[LayerShape, ...]
    """Without the values of sinks, which `lamina.model.weights.read_sinks` adds."""
    sinks: tuple[str | None, ...]
    logits: fx.Node


def capture(checkpoint: Checkpoint) -> Capture:
    """Capture the decoder of ``checkpoint``. UnsupportedModelError names what Lamina cannot represent."""
    path, kind = checkpoint.path, checkpoint.config.model_type
    with refusing(path, f"{kind} cannot be built by the transformers library"):
        architecture = _check_config(checkpoint.config)
        with _explaining(architecture):
            module = _meta_module(checkpoint)
    with refusing(path, f"{kind} cannot be captured as one graph"):
        with _explaining(architecture):
            program = _export(module)
        graph = program.graph_module.graph
        inputs, tensors = _placeholders(graph, program.graph_signature)
        use_positions(graph, inputs)
        _normalise(graph)
        attentions = graph.find_nodes(op="call_function", target=torch.ops.lamina.attention.default)
        if not attentions:
            raise UnsupportedModelError(
                f"{type(module).__name__} has no attention that the attention interface of the library routes, so it "
                "cannot be cut there"
            )
        sinks = tuple(_take_sinks(node, tensors) for node in attentions)
        check_tokens_apart(graph, inputs)
    (logits,) = graph.output_node().args[0]
    return Capture(
        checkpoint=checkpoint,
        module=module,
        graph=graph,
        inputs=inputs,
        tensors=tensors,
        attentions=tuple(attentions),
        shapes=tuple(_shape(node) for node in attentions),
        sinks=sinks,
        logits=logits,
    )


def _check_config(config: Any) -> type[PreTrainedModel]:
    """Refuse, by name, models that would otherwise fail deep inside the library with an obscure message; return the
    class of all others."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{config.model_type} is an encoder-decoder; Lamina supports decoders only")
    text = config.get_text_config()
    if others := set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES:
        raise UnsupportedModelError(f"layers of type {', '.join(sorted(others))} cannot be represented")
    architecture: type[PreTrainedModel] | None = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if architecture is None:
        raise UnsupportedModelError(f"{config.model_type} is not a causal language model of the transformers library")
    return architecture


@contextmanager
def _explaining(architecture: type[PreTrainedModel]) -> Iterator[None]:
    """Turn errors of a model that Lamina cannot trace into one that names what stands in the way, where it is known.

    Torch prints the whole graph beside some of them, which is dropped.
    """
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), _unlogged("torch"):
            yield
    except UnsupportedModelError:
        raise
    except Exception as e:
        if not architecture._supports_attention_backend:
            raise UnsupportedModelError(
                f"{architecture.__name__} does not route attention through the attention interface of the "
                "transformers library, so it cannot be cut there"
            ) from e
        if operators.CausalMask.__name__ in str(e):
            raise UnsupportedModelError(
                f"{architecture.__name__} changes its attention mask by itself, which Lamina cannot represent"
            ) from e
        if "data-dependent" in str(e):
            raise UnsupportedModelError(
                f"the code of {architecture.__name__} depends on values of a step, as with a loop over the experts in "
                "use that the experts interface of the transformers library does not know"
            ) from e
        raise


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _meta_module(checkpoint: Checkpoint) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    operators.install()
    dtype = getattr(torch, checkpoint.dtype)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(
            checkpoint.config, attn_implementation=operators.NAME, dtype=dtype
        ).eval()
    _fix_ropes(module)
    if module._can_set_experts_implementation():
        module.set_experts_implementation(operators.NAME)
    operators.hide_experts(module)
    kept = module._get_dtype_plan(dtype)
    for name, parameter in module.named_parameters():
        if any(pattern in name for pattern in kept):
            parameter.data = parameter.data.to(torch.float32)
    return module


def _fix_ropes(module: nn.Module) -> None:
    """Let rotary angles not depend on the length of the longest sequence."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for changing, fixed in _FIXED_ROPES.items():
        ROPE_INIT_FUNCTIONS[fixed] = ROPE_INIT_FUNCTIONS[changing]
    for part in module.modules():
        kind = getattr(part, "rope_type", None)
        if isinstance(kind, str):
            vars(part)["rope_type"] = _FIXED_ROPES.get(kind, kind)
        elif isinstance(kind, dict):
            vars(part)["rope_type"] = {layers: _FIXED_ROPES.get(own, own) for layers, own in kind.items()}


class _Logits(nn.Module):
    """The part of the library's interface that decoding uses: from token ids, positions and rows to logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        out = self.model(input_ids=token_ids, position_ids=positions, logits_to_keep=rows, use_cache=False)
        logits: Tensor = out.logits
        return logits


def _export(module: PreTrainedModel) -> torch.export.ExportedProgram:
    tokens, rows = torch.export.Dim("T", min=1, max=1 << 20), torch.export.Dim("S", min=1, max=1 << 20)
    ids = torch.zeros(1, TRACED_TOKENS, dtype=torch.long, device="meta")
    sampled = torch.zeros(_TRACED_ROWS, dtype=torch.long, device="meta")
    with torch.no_grad(), warnings.catch_warnings():
        # Torch warns about deprecated calls of its own, which a caller cannot change.
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(
            _Logits(module),
            (ids, ids.clone(), sampled),
            dynamic_shapes=({1: tokens}, {1: tokens}, {0: rows}),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        if any(_is_mutable(node) for node in program.graph.nodes):
            # Operators that write in place would tie nodes together without an edge.
            program = program.run_decompositions({})
    return program


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _normalise(graph: fx.Graph) -> None:
    """Remove nodes that change nothing or are unused, and merge nodes that compute the same value."""
    for assertion in (aten._assert_tensor_metadata.default, aten._assert_scalar.default):
        for node in graph.find_nodes(op="call_function", target=assertion):
            graph.erase_node(node)
    same: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if node.target is aten.view.default:
            # A view depends on the strides of the traced values, and a value that crosses a cut may have others.
            node.target = aten.reshape.default
        if _changes_nothing(node):
            _replace(node, node.args[0])
        elif node.op == "call_function":
            # Every layer computes the mask and the rotary angles again.
            original = same.setdefault((node.target, str(node.args), str(node.kwargs)), node)
            if original is not node:
                _replace(node, original)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise UnsupportedModelError(f"the graph contains {node.op} {node.target}, which cannot be cut")
        if node.op == "call_function" and not (
            isinstance(node.target, torch._ops.OpOverload)
            or node.target is operator.getitem
            or isinstance(node.meta["val"], (int, torch.SymInt))  # arithmetic with sizes
        ):
            raise UnsupportedModelError(f"the graph contains {node.target}, which is not a plain operator")


def _changes_nothing(node: fx.Node) -> bool:
    """Return whether a node is a dropout, or a conversion to the type that its input already has."""
    if node.target is aten.to.dtype and len(node.args) == 2:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return bool(source.meta["val"].dtype == node.meta["val"].dtype)
    return node.target is aten.dropout.default


def _replace(node: fx.Node, other: Any) -> None:
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)


def _take_sinks(attention: fx.Node, tensors: Mapping[fx.Node, str]) -> str | None:
    """Take the sinks away from an attention node, and return the name of the parameter that holds them."""
    sinks = attention.args[3]
    if sinks is None:
        return None
    if sinks not in tensors:
        raise UnsupportedModelError("the model computes its attention sinks; Lamina takes only a parameter")
    attention.update_arg(3, None)
    return tensors[cast(fx.Node, sinks)]


def _placeholders(
    graph: fx.Graph, signature: torch.export.ExportGraphSignature
) -> tuple[tuple[fx.Node, ...], dict[fx.Node, str]]:
    """Return the inputs of a step, and the names of the parameters and buffers."""
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    inputs, tensors = [], {}
    for node in graph.find_nodes(op="placeholder"):
        if node.name in named:
            tensors[node] = named[node.name].removeprefix("model.")
        elif node.name in signature.user_inputs:
            inputs.append(node)
        else:
            raise UnsupportedModelError(f"the graph needs the constant {node.name!r}, which no checkpoint holds")
    return tuple(inputs), tensors


def _shape(node: fx.Node) -> LayerShape:
    args: Any = node.args
    q, k, v, _, scale, window, chunk, softcap = args
    return LayerShape(
        q_heads=q.meta["val"].shape[1],
        kv_heads=k.meta["val"].shape[1],
        qk_dim=k.meta["val"].shape[2],
        v_dim=v.meta["val"].shape[2],
        scale=scale,
        window=window or None,
        chunk=chunk or None,
        softcap=softcap or None,
    )
