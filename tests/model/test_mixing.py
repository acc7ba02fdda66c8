"""What mixes the tokens of a step outside of attention is found in the graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from lamina.errors import UnsupportedModelError
from lamina.model.mixing import check_tokens_apart, use_positions

Code = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From token values [1, T, 8], positions [1, T] and rows [S] to anything."""


def trace(code: Code) -> tuple[fx.Graph, list[fx.Node]]:
    class Module(nn.Module):
        def forward(self, values: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
            return code(values, positions, rows)

    tokens, rows = torch.export.Dim("T", min=1, max=1 << 20), torch.export.Dim("S", min=1, max=1 << 20)
    example = (torch.zeros(1, 7, 8), torch.zeros(1, 7, dtype=torch.long), torch.zeros(3, dtype=torch.long))
    program = torch.export.export(Module(), example, dynamic_shapes=({1: tokens}, {1: tokens}, {0: rows}), strict=False)
    graph = program.graph_module.graph
    return graph, graph.find_nodes(op="placeholder")


MIXING: dict[str, tuple[Code, str]] = {
    "mean": (lambda x, p, r: x - x.mean(1, keepdim=True), "reduces all tokens"),
    "maximum": (lambda x, p, r: x + p.max(), "reduces all tokens"),
    "sum of products": (lambda x, p, r: x @ (x.transpose(1, 2) @ x), "reduces all tokens"),
    "first token": (lambda x, p, r: x + x[:, :1], "reduces all tokens"),
    "running sum": (lambda x, p, r: x.cumsum(1), "runs along the tokens"),
    "softmax": (lambda x, p, r: x.softmax(-2), "runs along the tokens"),
    "shift": (lambda x, p, r: x.roll(1, 1), "runs along the tokens"),
    "reverse": (lambda x, p, r: x.flip(1), "runs along the tokens"),
    "scores": (lambda x, p, r: x @ x.transpose(1, 2) @ x, "relates tokens to each other"),
    "attention": (
        lambda x, p, r: nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True),
        "relates tokens to each other",
    ),
    "convolution": (
        lambda x, p, r: nn.functional.conv1d(x.transpose(1, 2), x.new_ones(8, 1, 3), padding=1, groups=8),
        "mixes tokens that lie side by side",
    ),
    "causal convolution": (
        lambda x, p, r: nn.functional.conv1d(
            nn.functional.pad(x.transpose(1, 2), (2, 0)), x.new_ones(8, 1, 3), groups=8
        ),
        r"has a dimension of",
    ),
    "choice of tokens": (lambda x, p, r: x[:, p[0]], "picks tokens of a step"),
}


@pytest.mark.parametrize("what", MIXING)
def test_mixing_is_refused(what: str) -> None:
    code, message = MIXING[what]
    with pytest.raises(UnsupportedModelError, match=message):
        check_tokens_apart(*trace(code))


def test_what_treats_each_token_by_itself_is_no_mixing() -> None:
    """Norms, products, heads, flattened tokens, choices among experts, and the rows that are sampled."""

    def code(values: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        normed = values / values.pow(2).mean(-1, keepdim=True).sqrt()
        heads = normed.view(1, -1, 2, 4).transpose(1, 2).softmax(-1).transpose(1, 2).reshape(1, -1, 8)
        flat = (heads * positions[..., None]).view(-1, 8)
        best = flat.topk(2, dim=-1).values.cumsum(-1)
        return (flat * best[:, :1])[None][:, rows]

    check_tokens_apart(*trace(code))


@pytest.mark.parametrize("arguments", [(), (0,)])
def test_numbers_of_tokens_become_positions(arguments: tuple[int, ...]) -> None:
    """What counts the tokens of a step from 0 would be right only for one sequence without a past."""
    graph, inputs = trace(lambda x, p, r: x * torch.arange(*arguments, x.shape[1])[:, None].float() + r.sum())
    use_positions(graph, inputs)
    values, positions = torch.ones(1, 5, 8), torch.tensor([[3, 4, 9, 0, 1]])

    out = fx.GraphModule(nn.Module(), graph)(values, positions, torch.zeros(2, dtype=torch.long))

    assert out[0][0, :, 0].tolist() == positions[0].tolist()


def test_other_numbers_of_tokens_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="numbers the tokens of a step"):
        use_positions(*trace(lambda x, p, r: x * torch.arange(2, 2 + x.shape[1])[:, None].float() + r.sum()))
