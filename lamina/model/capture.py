"""Turn the module of a checkpoint into one graph of operators, without its weights.

The module is built and traced on the meta device, so that capturing takes a second and no memory, whatever the
size of the model. Tokens T and sampled rows S stay symbolic: one graph serves every batch.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lamina.attention import LayerShape
from lamina.errors import LaminaError, UnsupportedModelError
from lamina.model import operators
from lamina.model.checkpoint import Checkpoint

# Sizes of the example inputs; any two different numbers above 1 do, as both dimensions are symbolic.
TRACED_TOKENS = 7
_TRACED_ROWS = 3


@dataclass(frozen=True)
class Capture:
    """A captured model.

    ``graph`` computes logits [1, S, vocabulary] from ``inputs`` (token ids [1, T], positions [1, T], sampled
    rows [S]) and ``tensors`` (its other placeholders, with the names of parameters or buffers). ``attentions``
    are the attention nodes, one per layer, and ``shapes`` says what each of them computes. ``module`` is the
    meta module, which the weights are loaded by.
    """

    checkpoint: Checkpoint
    module: nn.Module
    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    tensors: dict[fx.Node, str]
    attentions: tuple[fx.Node, ...]
    shapes: tuple[LayerShape, ...]
    logits: fx.Node


def capture(checkpoint: Checkpoint) -> Capture:
    """Capture the decoder of ``checkpoint``; UnsupportedModelError names what Lamina cannot represent."""
    module = _meta_module(checkpoint)
    program = _export(module, checkpoint)
    graph = program.graph_module.graph
    _normalise(graph)

    signature = program.graph_signature
    named = signature.inputs_to_parameters | signature.inputs_to_buffers
    tensors, inputs = {}, []
    for node in graph.find_nodes(op="placeholder"):
        if node.name in named:
            tensors[node] = named[node.name].removeprefix("model.")
        elif node.name in signature.user_inputs:
            inputs.append(node)
        else:
            raise UnsupportedModelError(
                f"{checkpoint.path}: the graph needs the constant {node.name!r}, which has no name in the checkpoint"
            )
    attentions = graph.find_nodes(op="call_function", target=torch.ops.lamina.attention.default)
    _check_layers(checkpoint, [node.args[3] for node in attentions])
    (logits,) = graph.output_node().args[0]
    return Capture(
        checkpoint=checkpoint,
        module=module,
        graph=graph,
        inputs=tuple(inputs),
        tensors=tensors,
        attentions=tuple(attentions),
        shapes=tuple(_shape(node) for node in attentions),
        logits=logits,
    )


def _meta_module(checkpoint: Checkpoint) -> nn.Module:
    from transformers import AutoModelForCausalLM

    operators.install()
    config = checkpoint.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{checkpoint.path}: {config.model_type} is an encoder-decoder; Lamina decodes decoders only"
        )
    dtype = getattr(torch, checkpoint.dtype)
    with _refusing(checkpoint, "cannot be built by the transformers library"), torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, attn_implementation=operators.NAME, dtype=dtype).eval()
        if module._can_set_experts_implementation():
            module.set_experts_implementation(operators.NAME)
    if not module._supports_attention_backend:
        raise UnsupportedModelError(
            f"{checkpoint.path}: {type(module).__name__} does not route attention through the attention interface of the "
            "transformers library, so it cannot be cut there"
        )
    kept = module._get_dtype_plan(dtype)
    for name, parameter in module.named_parameters():
        if any(pattern in name for pattern in kept):
            parameter.data = parameter.data.to(torch.float32)
    return module


class _Logits(nn.Module):
    """The part of the library's call that decoding uses: token ids, positions and rows in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        out = self.model(input_ids=token_ids, position_ids=positions, logits_to_keep=rows, use_cache=False)
        logits: Tensor = out.logits
        return logits


def _export(module: nn.Module, checkpoint: Checkpoint) -> torch.export.ExportedProgram:
    tokens, rows = torch.export.Dim("T", min=1, max=1 << 20), torch.export.Dim("S", min=1, max=1 << 20)
    ids = torch.zeros(1, TRACED_TOKENS, dtype=torch.long, device="meta")
    sampled = torch.zeros(_TRACED_ROWS, dtype=torch.long, device="meta")
    with _refusing(checkpoint, "cannot be captured as one graph"), torch.no_grad(), warnings.catch_warnings():
        # torch's own deprecated calls; nothing that a caller could change.
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(
            _Logits(module),
            (ids, ids.clone(), sampled),
            dynamic_shapes=({1: tokens}, {1: tokens}, {0: rows}),
            strict=False,
        )
        if any(_is_mutable(node) for node in program.graph.nodes):
            # Operators that write in place would tie nodes together in ways which no edge shows.
            program = program.run_decompositions({})
    return program


@contextmanager
def _refusing(checkpoint: Checkpoint, what: str) -> Iterator[None]:
    """Turn whatever the libraries raise into one sentence that names the model."""
    try:
        yield
    except LaminaError:
        raise
    except Exception as e:
        reason = " ".join(str(e).split())[:300] or type(e).__name__
        raise UnsupportedModelError(f"{checkpoint.path}: {checkpoint.config.model_type} {what}: {reason}") from e


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _normalise(graph: fx.Graph) -> None:
    """Drop assertions, conversions that change nothing and the dropout of training, then whatever nobody uses."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)
    for node in graph.nodes:
        converts = node.target is torch.ops.aten.to.dtype and len(node.args) == 2
        if node.target is torch.ops.aten.dropout.default or (
            converts and node.args[0].meta["val"].dtype == node.meta["val"].dtype
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is torch.ops.aten.view.default:
            # A view holds for the strides of the traced values; what crosses a cut may be laid out otherwise.
            node.target = torch.ops.aten.reshape.default
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise UnsupportedModelError(f"the graph contains {node.op} {node.target}, which cannot be cut")
        if (
            node.op == "call_function"
            and node.target is not operator.getitem
            and not isinstance(node.target, torch._ops.OpOverload)
        ):
            raise UnsupportedModelError(f"the graph contains {node.target}, which is not a plain operator")


def _check_layers(checkpoint: Checkpoint, layers: list[Any]) -> None:
    """Every layer must be attention: other token mixers keep a state that nobody would hold."""
    config = checkpoint.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UnsupportedModelError(
            f"{checkpoint.path}: layers of type {', '.join(sorted(kinds))} cannot be represented"
        )
    if layers != list(range(config.num_hidden_layers)):
        raise UnsupportedModelError(
            f"{checkpoint.path}: expected one attention in each of {config.num_hidden_layers} layers, found it in layers {layers}"
        )


def _shape(node: fx.Node) -> LayerShape:
    q, k, v, _, scale, window, softcap = node.args
    return LayerShape(
        q_heads=q.meta["val"].shape[1],
        kv_heads=k.meta["val"].shape[1],
        qk_dim=k.meta["val"].shape[2],
        v_dim=v.meta["val"].shape[2],
        scale=scale,
        window=window or None,
        softcap=softcap or None,
    )
