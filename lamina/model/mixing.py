"""Check that nothing but attention mixes the tokens of a step.

A step packs tokens of many sequences side by side, without the tokens before them. So everything else in the graph has
to treat each token by itself: a convolution or a recurrence over tokens would need a state, a mean would mix sequences,
and the number of tokens says nothing about positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lamina.errors import UnsupportedModelError

aten = torch.ops.aten

_RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
# Operators that look beyond a number along a dimension and keep its size, and the place of that dimension.
_ALONG = {
    "argsort": 1,
    "cummax": 1,
    "cummin": 1,
    "cumprod": 1,
    "cumsum": 1,
    "flip": 1,
    "gather": 1,
    "index_add": 1,
    "index_copy": 1,
    "log_softmax": 1,
    "logcumsumexp": 1,
    "roll": 2,
    "scatter": 1,
    "scatter_add": 1,
    "scatter_reduce": 1,
    "softmax": 1,
    "sort": 1,
    "topk": 2,
}
# Parts of the names of operators that mix whatever lies behind their first two dimensions.
_SPATIAL = ("batch_norm", "conv", "group_norm", "instance_norm", "pool")
# Parts of the names of operators that mix tokens in ways of their own.
_MIXING = ("attention", "fft", "gru", "lstm", "rnn", "unfold")


def use_positions(graph: fx.Graph, inputs: Sequence[fx.Node]) -> None:
    """Let what numbers the tokens of a step from 0 on read their positions instead.

    Some models compute positions from the number of tokens, to which they add what a cache holds, here nothing.
    """
    token_ids, positions, _ = inputs
    tokens = _expression(token_ids.meta["val"].shape[1])
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.target not in _RANGES or _expression((value := node.meta["val"]).shape[0]) != tokens:
            continue
        if node.args[:-1] != () and (node.args[0], *node.args[2:]) not in ((0,), (0, 1)):
            raise _refused(node, "numbers the tokens of a step")
        with graph.inserting_after(positions):
            own = graph.call_function(aten.select.int, (positions, 0, 0))
            own.meta["val"] = positions.meta["val"][0]
        if value.dtype != own.meta["val"].dtype:
            with graph.inserting_after(own):
                own = graph.call_function(aten.to.dtype, (own, value.dtype))
                own.meta["val"] = value
        node.replace_all_uses_with(own)
        graph.erase_node(node)


def check_tokens_apart(graph: fx.Graph, inputs: Sequence[fx.Node]) -> None:
    """Raise UnsupportedModelError, which names the operator and its module, where tokens are mixed."""
    token_ids, _, rows = inputs
    tokens, sampled = token_ids.meta["val"].shape[1], rows.meta["val"].shape[0]
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace == "lamina":
            continue
        for value in _tensors(node.meta["val"]):
            _check_sizes(node, value, tokens, sampled)
        if any(_dim_of(value, tokens) is not None for i in node.all_input_nodes for value in _tensors(i.meta["val"])):
            _check_operator(node, tokens, rows)


def _check_sizes(node: fx.Node, value: Tensor, tokens: Any, sampled: Any) -> None:
    dims = [size for size in value.shape if _is_symbolic(size)]
    for size in dims:
        expression = _expression(size)
        if not any(_is_multiple(expression, _expression(whole)) for whole in (tokens, sampled)):
            raise _refused(
                node, f"has a dimension of {expression}, where {_expression(tokens)} is the number of tokens"
            )
    if len(dims) > 1:
        raise _refused(node, "relates tokens to each other outside of the attention interface of the library")


def _check_operator(node: fx.Node, tokens: Any, rows: fx.Node) -> None:
    name = str(node.target).split(".")[1].removeprefix("_")
    if any(part in name for part in _MIXING):
        raise _refused(node, "relates tokens to each other outside of the attention interface of the library")
    if name.startswith("new_"):  # which reads no number
        return
    outputs = list(_tensors(node.meta["val"]))
    if outputs and not any(_is_symbolic(size) for value in outputs for size in value.shape):
        raise _refused(node, "reduces all tokens of a step to one value")
    arguments: Any = node.args
    source = arguments[0]
    if not isinstance(source, fx.Node) or not isinstance(value := source.meta["val"], Tensor):
        return
    dim = _dim_of(value, tokens)
    if dim is None:
        return
    if any(part in name for part in _SPATIAL) and dim >= 2:
        raise _refused(node, "mixes tokens that lie side by side")
    if name in _ALONG:
        place = _ALONG[name]
        along: Any = node.kwargs.get("dim", arguments[place] if len(arguments) > place else -1)
        if dim in [d % value.ndim for d in (along if isinstance(along, (list, tuple)) else [along])]:
            raise _refused(node, "runs along the tokens of a step")
    indices: Any = []
    if name in ("index", "index_put"):
        indices = arguments[1]
    elif name == "index_select":
        indices = [None] * (arguments[1] % value.ndim) + [arguments[2]]
    if dim < len(indices) and indices[dim] not in (None, rows):
        raise _refused(node, "picks tokens of a step")


def _refused(node: fx.Node, what: str) -> UnsupportedModelError:
    modules = node.meta.get("nn_module_stack") or {}
    path = [str(path).removeprefix("model.") for path, _ in modules.values()]
    where = f" in {path[-1]}" if path and path[-1] else ""
    return UnsupportedModelError(f"{node.target}{where} {what}, which Lamina cannot cut")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _dim_of(value: Tensor, tokens: Any) -> int | None:
    """Return the dimension that holds the tokens of a step, if any."""
    for dim, size in enumerate(value.shape):
        if _is_symbolic(size) and _is_multiple(_expression(size), _expression(tokens)):
            return dim
    return None


def _is_symbolic(size: Any) -> bool:
    return isinstance(size, torch.SymInt)


def _expression(size: Any) -> Any:
    return size.node.expr if _is_symbolic(size) else size


def _is_multiple(expression: Any, whole: Any) -> bool:
    return bool((expression / whole).is_Integer)
