"""The benchmark of slices: what it compares are the same products."""

import pytest

from lamina.bench.slices import SHAPES, LlamaShape


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_products_are_those_of_the_slices(shape: LlamaShape) -> None:
    """A middle slice consists of the products of the yardstick and two norms; the last ends in the projection."""
    _, middle, last = (piece.sizes.parameters for piece in shape.blueprint(2).slices)

    products = [outputs * inputs for outputs, inputs in shape.products]
    norms = 2 * shape.hidden
    o_gate_up_down = sum(products[:4])
    assert middle == sum(products) + norms
    assert last == o_gate_up_down + shape.projection[0] * shape.projection[1] + norms
