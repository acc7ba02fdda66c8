"""The slices of a captured model; a slice is what runs between two attention operators.

A model of L layers has L + 1 slices. Every slice except the last consists of two pure functions, so that q can be sent
before k and v are computed:

    head: (carry of the previous slice, o of the previous attention) -> q, kept
    tail: kept -> k, v, carry

The last slice has only a head, which returns the logits of the sampled rows. Values that depend only on the token ids,
positions and rows of a step (rotary angles, sizes) are computed once per step, by ``SlicedModel.begin``.
"""

from __future__ import annotations

import logging
import math
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from lamina.attention import LayerShape
from lamina.model.capture import TRACED_TOKENS, Capture
from lamina.model.cut import Boundary, SlicePlan, cut
from lamina.model.functions import Function, RunFunction, make

log = logging.getLogger("lamina.model")

# The values of a step that depend only on its token ids, positions and rows: tensors and sizes, in a fixed order.
StepConstants = tuple[Any, ...]


class Head(NamedTuple):
    """The result of a head: q [T, Hq, Dk], or in the last slice the logits [S, vocabulary], and values for the tail."""

    out: Tensor
    kept: tuple[Tensor, ...]


class Tail(NamedTuple):
    """The result of a tail: k [T, Hkv, Dk], v [T, Hkv, Dv] and the tensors of the carry, each [1, T, ...]."""

    k: Tensor
    v: Tensor
    carry: tuple[Tensor, ...]


@dataclass(frozen=True)
class SliceSizes:
    """What a slice holds, and the bytes per token that it moves. The attention fields are 0 in the last slice."""

    parameters: int
    parameter_bytes: int
    carry: int
    q: int
    k: int
    v: int
    o: int


@dataclass(frozen=True)
class _SlicePart:
    """One function of a slice, and where its arguments come from."""

    key: str
    graph: fx.Graph
    weights: tuple[str, ...]
    constants: tuple[int, ...]


@dataclass(frozen=True)
class SliceBlueprint:
    """A slice without its weights."""

    index: int
    shape: LayerShape | None
    head: _SlicePart
    tail: _SlicePart | None
    carry: tuple[fx.Node, ...]
    sizes: SliceSizes

    @property
    def weights(self) -> frozenset[str]:
        """The names of all parameters and buffers that the slice reads."""
        return frozenset(self.head.weights + (self.tail.weights if self.tail else ()))


@dataclass(frozen=True)
class Blueprint:
    """A captured model, cut into slices; ``begin`` computes the constants of a step."""

    capture: Capture
    begin: _SlicePart
    slices: tuple[SliceBlueprint, ...]

    @property
    def kinds(self) -> int:
        """The number of different functions in the slices."""
        return len({part.key for s in self.slices for part in (s.head, s.tail) if part})

    def weights_of(self, first: int = 0, last: int | None = None) -> frozenset[str]:
        """Return the names of the tensors that the slices ``first..last`` (inclusive, by default all) read."""
        chosen = self.slices[first : None if last is None else last + 1]
        return frozenset(self.begin.weights).union(*(s.weights for s in chosen))


def cut_into_slices(captured: Capture) -> Blueprint:
    """Cut ``captured`` at its attention operators."""
    constant = _step_constants(captured)
    order = [n for n in captured.graph.nodes if n.op == "call_function" and n not in constant]
    placed = set(order)
    inputs_of = {n: [i for i in n.all_input_nodes if i in placed] for n in order}
    nbytes = {n: _bytes_per_token(n) for n in order}
    boundaries = [_boundary(n) for n in captured.attentions]
    plans = cut(order, inputs_of, nbytes, boundaries, captured.logits)

    # The constants that a slice reads, in graph order.
    read = {i for n in order for i in n.all_input_nodes if i in constant}
    outputs = [n for n in captured.graph.nodes if n in read]
    place = {n: i for i, n in enumerate(outputs)}
    computed = [n for n in captured.graph.nodes if n in constant and n.op == "call_function"]
    begin = _part(captured, computed, captured.inputs, outputs, {})

    slices = []
    for index, plan in enumerate(plans):
        previous = plans[index - 1].carry if index else ()
        entering = (*previous, boundaries[index - 1].o) if index else ()
        boundary = boundaries[index] if index < len(boundaries) else None
        slices.append(_slice(captured, index, plan, entering, boundary, place, nbytes))
    return Blueprint(captured, begin, tuple(slices))


def _boundary(attention: fx.Node) -> Boundary[fx.Node]:
    q, k, v, *_ = cast(Any, attention.args)
    return Boundary(q, k, v, attention)


def _step_constants(captured: Capture) -> set[fx.Node]:
    """Return the nodes that depend on the step's inputs and on buffers, but on no parameter."""
    parameters = {name for name, _ in captured.module.named_parameters(remove_duplicate=False)}
    buffers = {n for n, name in captured.tensors.items() if name not in parameters}
    constant: set[fx.Node] = {*captured.inputs, *buffers}
    for node in captured.graph.nodes:
        if node.op == "call_function" and constant.issuperset(node.all_input_nodes):
            constant.add(node)
    # A buffer that a slice reads directly is a weight like any other.
    return constant - buffers


def _slice(
    captured: Capture,
    index: int,
    plan: SlicePlan[fx.Node],
    entering: Sequence[fx.Node],
    boundary: Boundary[fx.Node] | None,
    place: Mapping[fx.Node, int],
    nbytes: Mapping[fx.Node, int | None],
) -> SliceBlueprint:
    if boundary is None:
        head, tail, shape = _part(captured, plan.head, entering, [captured.logits], place), None, None
    else:
        leaving = [boundary.k, boundary.v, *plan.carry]
        # A split returns a tuple. The tail gets its members, never the tuple itself.
        members = [n for n in plan.tail if n.target is operator.getitem and n.args[0] in plan.head]
        head_nodes, tail_nodes = [*plan.head, *members], [n for n in plan.tail if n not in members]
        in_tail = set(tail_nodes)
        wanted = {i for n in tail_nodes for i in n.all_input_nodes if i not in in_tail} | set(leaving) - in_tail
        kept = [n for n in (*entering, *head_nodes) if n in wanted]
        head = _part(captured, head_nodes, entering, [boundary.q, *kept], place)
        tail = _part(captured, tail_nodes, kept, leaving, place)
        shape = captured.shapes[index]

    names = set(head.weights) | set(tail.weights if tail else ())
    weights = [captured.module.get_parameter(n) for n in names if _is_parameter(captured.module, n)]
    q, k, v, o = [_known(nbytes[n]) for n in (boundary.q, boundary.k, boundary.v, boundary.o)] if boundary else [0] * 4
    sizes = SliceSizes(
        parameters=sum(w.numel() for w in weights),
        parameter_bytes=sum(w.numel() * w.itemsize for w in weights),
        carry=sum(_known(nbytes[n]) for n in plan.carry),
        q=q,
        k=k,
        v=v,
        o=o,
    )
    return SliceBlueprint(index, shape, head, tail, plan.carry, sizes)


def _is_parameter(module: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf in module.get_submodule(owner)._parameters


def _known(nbytes: int | None) -> int:
    assert nbytes is not None
    return nbytes


def _bytes_per_token(node: fx.Node) -> int | None:
    """Return the bytes of a value per token of the step; None if it is no tensor (the tuple of a split)."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return None
    shape: Sequence[Any] = value.shape
    sizes = [d.node.hint if isinstance(d, torch.SymInt) else d for d in shape]
    numbers: int = math.prod(sizes)
    return math.ceil(numbers * value.itemsize / TRACED_TOKENS)


def _part(
    captured: Capture,
    nodes: Iterable[fx.Node],
    entering: Sequence[fx.Node],
    leaving: Sequence[fx.Node],
    place: Mapping[fx.Node, int],
) -> _SlicePart:
    """Turn ``nodes`` into a function of (weights, step constants, ``entering``) that returns the tuple ``leaving``.

    The key is the text of the whole function, with only the shapes and types of its inputs, so that parts with equal
    keys are the same function of different weights.
    """
    nodes = list(nodes)
    inside = set(nodes) | set(entering)
    outside = dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside)
    weights = [n for n in outside if n in captured.tensors]
    constants = [n for n in outside if n in place]
    assert len(weights) + len(constants) == len(outside), "a part reads a value that is none of its inputs"

    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    text = []
    for n in (*weights, *constants, *entering):
        copies[n] = graph.placeholder(f"a{len(copies)}")
        copies[n].meta["val"] = n.meta["val"]
        value = n.meta["val"]
        text.append(f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else "number")
    for n in nodes:
        copies[n] = graph.node_copy(n, copies.__getitem__)
        copies[n].name = f"v{len(copies)}"
        text.append(f"{copies[n].name} = {n.target} {copies[n].args} {copies[n].kwargs}")
    out = graph.output(tuple(copies[n] for n in leaving))
    text.append(str(out.args))
    return _SlicePart(
        "\n".join(text),
        graph,
        tuple(captured.tensors[n] for n in weights),
        tuple(place[n] for n in constants),
    )


class Slice:
    """A slice with its weights on a device."""

    def __init__(self, blueprint: SliceBlueprint, head: _Bound, tail: _Bound | None) -> None:
        self.index = blueprint.index
        self.shape = blueprint.shape
        self._head = head
        self._tail = tail

    def head(self, constants: StepConstants, carry: tuple[Tensor, ...] = (), o: Tensor | None = None) -> Head:
        """Run the slice up to q, or the last slice up to the logits. ``o`` [T, Hq, Dv] is None for the first slice."""
        out, *kept = self._head(constants, carry if o is None else (*carry, o.contiguous()))
        return Head(out if self._tail else out[0], tuple(kept))

    def tail(self, constants: StepConstants, kept: tuple[Tensor, ...]) -> Tail:
        """Run the rest of the slice, from the values that the head kept."""
        assert self._tail is not None, "the last slice has no tail"
        k, v, *carry = self._tail(constants, kept)
        return Tail(k, v, tuple(carry))


class SlicedModel:
    """The slices ``first..last`` of a model, ready to run on one device.

    Tensors that the slices read are removed from ``weights``, so that weights packed for the CPU are not in memory
    twice. ``compiled`` compiles each kind of part once, which takes some seconds unless the user's cache has it.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        weights: dict[str, Tensor],
        device: torch.device,
        first: int = 0,
        last: int | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        chosen = blueprint.slices[first : None if last is None else last + 1]
        parts = {"step constants": blueprint.begin}
        for piece in chosen:
            parts[f"head of slice {piece.index}"] = piece.head
            if piece.tail:
                parts[f"tail of slice {piece.index}"] = piece.tail
        self.device = device
        self.shapes = blueprint.capture.shapes
        """The attention of every layer, including layers on other nodes."""
        self._carries = [piece.carry for piece in blueprint.slices]
        self._first = first
        functions = _functions(parts, device, compiled=compiled)
        bound = _bind_all(parts.values(), functions, weights)
        self._begin = next(bound)
        self.slices = tuple(Slice(s, next(bound), next(bound) if s.tail else None) for s in chosen)

    def begin(self, token_ids: Tensor, positions: Tensor, rows: Tensor) -> StepConstants:
        """Start a step with token ids [T], positions [T] and the rows [S] whose logits are wanted, all int64."""
        return tuple(self._begin((), (token_ids.unsqueeze(0), positions.unsqueeze(0), rows)))

    def slice(self, index: int) -> Slice:
        """Return the slice with the number ``index`` in the whole model."""
        return self.slices[index - self._first]

    def carry_shapes(self, index: int, tokens: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Return the shapes and types of a slice's carry for ``tokens`` tokens."""
        return carry_shapes(self._carries[index], tokens)


def carry_shapes(carry: Iterable[fx.Node], tokens: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return the shapes and types of a carry for ``tokens`` tokens."""
    found = []
    for node in carry:
        value = node.meta["val"]
        shape = tuple(tokens if isinstance(size, torch.SymInt) else int(size) for size in value.shape)
        found.append((shape, value.dtype))
    return found


def _functions(parts: Mapping[str, _SlicePart], device: torch.device, *, compiled: bool) -> dict[str, Function]:
    """Return the function of each kind of part, by key; a kind is named after its first part."""
    kinds = len({part.key for part in parts.values()})
    functions: dict[str, Function] = {}
    for name, part in parts.items():
        if part.key in functions:
            continue
        if compiled:
            number = len(functions) + 1
            progress = f"compiling {number} of {kinds}"
            log.info("event=compiling part=%d of=%d name=%r", number, kinds, name, extra={"progress": progress})
        functions[part.key] = make(part.graph, len(part.weights), device, name=name, compiled=compiled)
    return functions


def _bind_all(
    parts: Iterable[_SlicePart], functions: Mapping[str, Function], weights: dict[str, Tensor]
) -> Iterator[_Bound]:
    """Give each part its weights, and remove from ``weights`` those that no later part reads."""
    parts = list(parts)
    readers = Counter(name for part in parts for name in part.weights)
    packs: dict[tuple[str, ...], Tensor] = {}
    for part in parts:
        function = functions[part.key]
        inputs = function.arrange(part.weights, weights, packs)
        readers.subtract(part.weights)
        for name in part.weights:
            if not readers[name]:
                del weights[name]
        yield _Bound(function.run, inputs, part.constants)


class _Bound:
    """A function with its weights, and with the places of the step constants that it reads."""

    __slots__ = ("_constants", "_run", "_weights")

    def __init__(self, run: RunFunction, weights: tuple[Tensor, ...], constants: tuple[int, ...]) -> None:
        self._run, self._weights, self._constants = run, weights, constants

    def __call__(self, constants: StepConstants, values: tuple[Any, ...]) -> Sequence[Any]:
        return self._run([*self._weights, *[constants[i] for i in self._constants], *values])
