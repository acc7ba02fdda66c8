"""Turn the graph of a part into a function of a device, with packed products on the CPU, and compiled if possible.

Inductor compiles the graph directly. The symbolic sizes are those of the capture, so that one function serves any
number of tokens, and a call checks no guards. Inductor keeps its results in the user's cache, by the text of the
graph.
"""

from __future__ import annotations

import copy
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from lamina.model.cache import cache_folder, keep_inductor_private
from lamina.model.products import can_pack, pack

log = logging.getLogger("lamina.model")

_linear = torch.ops.aten.linear.default
_product = torch.ops.lamina.product.default

RunFunction = Callable[[list[Any]], Sequence[Any]]
"""A function from a list of inputs, which it empties, to the outputs."""


@dataclass(frozen=True)
class Function:
    """A part on a device. Its inputs begin with weights.

    ``weights`` holds, for each of them, its places among the weights of the part, and whether it is packed. Several
    places mean weights that are concatenated because they are multiplied with the same values.
    """

    run: RunFunction
    weights: tuple[tuple[tuple[int, ...], bool], ...]

    def arrange(
        self, names: Sequence[str], weights: Mapping[str, Tensor], packs: dict[tuple[str, ...], Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the weights ``names`` of a part as inputs; ``packs`` holds weights to reuse, and gets the new ones."""
        inputs = []
        for places, packed in self.weights:
            chosen = tuple(names[place] for place in places)
            if not packed:
                inputs.append(weights[chosen[0]])
                continue
            if chosen not in packs:
                tensors = [weights[name] for name in chosen]
                packs[chosen] = pack(torch.cat(tensors) if len(tensors) > 1 else tensors[0])
            inputs.append(packs[chosen])
        return tuple(inputs)


def make(graph: fx.Graph, weights: int, device: torch.device, *, name: str, compiled: bool) -> Function:
    """Return the function of ``graph``, whose first ``weights`` inputs are weights; ``name`` is for the log.

    All inputs and outputs that are tensors are in row-major order.
    """
    graph = _placed(graph, device)
    order: list[tuple[tuple[int, ...], bool]] = [((place,), False) for place in range(weights)]
    if device.type == "cpu":
        order = _pack(graph, weights)
    _make_contiguous(graph)
    module = fx.GraphModule(nn.Module(), graph)
    run = _compile(module, name) if compiled and device.type == "cpu" else None
    return Function(run or _eager(module), tuple(order))


def _placed(traced: fx.Graph, device: torch.device) -> fx.Graph:
    """Return a copy, to run on ``device``, of a graph that was traced on the meta device."""

    def placed(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) and argument.type == "meta" else argument

    graph = copy.deepcopy(traced)
    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, placed)
        node.kwargs = fx.node.map_aggregate(node.kwargs, placed)
    return graph


def _pack(graph: fx.Graph, weights: int) -> list[tuple[tuple[int, ...], bool]]:
    """Make products use packed weights where nothing else reads them, and return the new order of the weights.

    Products of the same values become one product with all of their weights, unless one of them has a bias.
    """
    placeholders = graph.find_nodes(op="placeholder")
    own = placeholders[:weights]
    place = {node: i for i, node in enumerate(own)}
    packed = {node for node in own if _only_multiplied(node)}
    products = [n for n in graph.nodes if n.target is _linear and _weight(n) in packed]
    groups: dict[Any, list[fx.Node]] = {}
    for node in products:
        alone = _bias(node) is not None or len(_weight(node).users) > 1
        groups.setdefault((node.args[0], node if alone else None), []).append(node)

    order: list[tuple[tuple[int, ...], bool]] = []
    inputs: dict[tuple[int, ...], fx.Node] = {}
    for node in own:
        if node not in packed:
            order.append(((place[node],), False))
    with graph.inserting_after(placeholders[-1]):
        for members in groups.values():
            places = tuple(place[_weight(node)] for node in members)
            if places not in inputs:
                inputs[places] = graph.placeholder(f"packed{len(inputs)}")
                outputs = sum(_weight(node).meta["val"].shape[0] for node in members)
                value = _weight(members[0]).meta["val"]
                inputs[places].meta["val"] = torch.empty(outputs, value.shape[1], dtype=value.dtype, device="meta")
                order.append((places, True))
    for members in groups.values():
        _multiply(graph, members, inputs[tuple(place[_weight(node)] for node in members)])
    kept = [node for node in own if node not in packed]
    _reorder(graph, [*kept, *inputs.values(), *placeholders[weights:]])
    for node in packed:
        graph.erase_node(node)
    return order


def _only_multiplied(weight: fx.Node) -> bool:
    value = weight.meta["val"]
    return (
        value.ndim == 2
        and can_pack(value.dtype)
        and bool(weight.users)
        and all(user.target is _linear and weight not in (user.args[0], *user.args[2:]) for user in weight.users)
    )


def _weight(product: fx.Node) -> fx.Node:
    return cast(fx.Node, product.args[1])


def _bias(product: fx.Node) -> fx.Node | None:
    return cast(fx.Node, product.args[2]) if len(product.args) > 2 else None


def _multiply(graph: fx.Graph, members: Sequence[fx.Node], weight: fx.Node) -> None:
    """Replace the products ``members`` of one value with a single product by ``weight``."""
    first = members[0]
    with graph.inserting_before(first):
        product = graph.call_function(_product, (first.args[0], weight, _bias(first)))
        start = 0
        for node in members:
            end = start + _weight(node).meta["val"].shape[0]
            last = node.meta["val"].ndim - 1
            part = (
                product
                if len(members) == 1
                else graph.call_function(torch.ops.aten.slice.Tensor, (product, last, start, end))
            )
            part.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(part)
            start = end
    for node in members:
        graph.erase_node(node)


def _reorder(graph: fx.Graph, placeholders: Sequence[fx.Node]) -> None:
    """Move ``placeholders`` to the front, in this order."""
    first = next(iter(graph.nodes))
    for node in placeholders:
        if node is not first:
            first.prepend(node)
        else:
            first = first.next


def _make_contiguous(graph: fx.Graph) -> None:
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        (results,) = output.args
        output.args = (
            tuple(
                graph.call_function(torch.ops.aten.contiguous.default, (node,))
                if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)
                else node
                for node in results
            ),
        )


def _eager(module: fx.GraphModule) -> RunFunction:
    forward = module.forward

    def run(inputs: list[Any]) -> Sequence[Any]:
        outputs: Sequence[Any] = forward(*inputs)
        return outputs

    return run


def _compile(module: fx.GraphModule, name: str) -> RunFunction | None:
    """Compile ``module``; if that fails, log a warning and return None."""
    started = time.perf_counter()
    try:
        run = _inductor(module)
    except Exception as e:  # a failure only costs speed, as the graph runs uncompiled
        reason = str(e).strip().splitlines()
        log.warning(
            "event=not_compiled part=%r reason=%r; it runs uncompiled, which is slower",
            name,
            f"{type(e).__name__}: {reason[0] if reason else ''}",
        )
        return None
    log.info("event=compiled part=%r seconds=%.1f", name, time.perf_counter() - started)
    return run


def _inductor(module: fx.GraphModule) -> RunFunction:
    keep_inductor_private()
    import torch._inductor.codecache
    import torch._inductor.config

    # Headers are kept beside the cache, in a folder that torch chooses when it is imported.
    headers = cache_folder("inductor") / "precompiled_headers"
    torch._inductor.codecache._HEADER_DIR = str(headers)
    torch._inductor.codecache._HEADER_LOCK_DIR = str(headers / "locks")
    settings: dict[str, Any] = {
        "compile_threads": 1,  # more threads would be processes that import torch again
        "cpp.threads": torch.get_num_threads(),
        "cpp_cache_precompile_headers": shutil.which("openssl") is not None,  # which names them
        "fx_graph_cache": True,
        "size_asserts": False,  # packed weights have no strides
    }
    with torch._inductor.config.patch(settings), warnings.catch_warnings():
        # Torch warns about deprecated calls of its own, which a caller cannot change.
        warnings.simplefilter("ignore")
        from torch._guards import TracingContext, tracing
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.decomposition import select_decomp_table
        from torch.fx.experimental.proxy_tensor import make_fx

        values = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
        fake_mode = next(value.fake_mode for value in values if hasattr(value, "fake_mode"))
        with fake_mode, torch.no_grad():
            inputs = [
                torch.empty(value.shape, dtype=value.dtype, device="cpu") if isinstance(value, Tensor) else value
                for value in values
            ]
            # Inductor takes a graph of elementary operators, so composite ones are decomposed.
            interpreter = fx.Interpreter(module)
            lowered = make_fx(lambda *given: interpreter.run(*given), select_decomp_table())(*inputs)
        with tracing(TracingContext(fake_mode)), torch.no_grad():
            compiled: Any = compile_fx_inner(lowered, inputs, is_inference=True)
    run: RunFunction = compiled.current_callable
    return run
