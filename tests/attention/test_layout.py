from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

import lamina.attention
from lamina.attention import KVLayout, LayerGroup, LayerShape, Rows, Run
from lamina.errors import ConfigError, UsageError

SHAPE: dict[str, Any] = {"q_heads": 8, "kv_heads": 2, "qk_dim": 64, "v_dim": 32, "scale": 0.125}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("q_heads", 0),
        ("q_heads", 65538),
        ("kv_heads", -1),
        ("kv_heads", 2**32 + 2),
        ("kv_heads", 3),
        ("qk_dim", 1.5),
        ("qk_dim", 65537),
        ("v_dim", 0),
        ("v_dim", 2**31),
        ("scale", float("nan")),
        ("window", 0),
        ("chunk", -1),
        ("softcap", 0.0),
        ("softcap", 9e-07),
        ("softcap", float("inf")),
        ("sinks", (1.0, 2.0)),
        ("sinks", (0.0,) * 7 + (float("inf"),)),
        ("slopes", (1.0,) * 7),
        ("slopes", (float("nan"),) * 8),
    ],
)
def test_an_impossible_layer_is_refused_by_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^LayerShape\.{field}: expected .* got {re.escape(str(value))}$"):
        LayerShape(**{**SHAPE, field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("layers", ()), ("dtype", "int4"), ("block_tokens", 0), ("block_tokens", 65537)]
)
def test_an_impossible_layout_is_refused_by_field(field: str, value: object) -> None:
    layout: dict[str, Any] = {"layers": (LayerShape(**SHAPE),), "dtype": "float16"}
    with pytest.raises(ConfigError, match=rf"^KVLayout\.{field}: expected "):
        KVLayout(**{**layout, field: value})


def test_the_largest_shapes_are_taken() -> None:
    """Up to 65536 heads, numbers of a head and tokens of a block, any window and the least soft cap."""
    shape = LayerShape(q_heads=65536, kv_heads=65536, qk_dim=65536, v_dim=65536, scale=1.0, window=2**40, softcap=1e-6)

    assert KVLayout(layers=(shape,), dtype="float32", block_tokens=65536).bytes_per_token == 2 * 4 * 65536**2


def test_a_layout_counts_keys_and_values_of_all_its_layers() -> None:
    wide = LayerShape(q_heads=4, kv_heads=4, qk_dim=192, v_dim=128, scale=1.0)
    layout = KVLayout(layers=(LayerShape(**SHAPE), wide), dtype="bfloat16", block_tokens=32)

    assert layout.bytes_per_token == 2 * (2 * (64 + 32) + 4 * (192 + 128))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_types_of_8_bits_count_their_scales(dtype: str) -> None:
    """One float32 for the key and one for the value of each KV head."""
    layout = KVLayout(layers=(LayerShape(**SHAPE),), dtype=dtype)

    assert layout.bytes_per_token == 2 * (64 + 32) + 2 * 2 * 4


def test_layers_are_grouped_by_window_chunk_and_shape() -> None:
    """In order of first appearance; scale, soft cap, sinks, slopes and query heads make no difference."""
    full = LayerShape(**SHAPE)
    sliding = replace(full, window=100)
    other = replace(full, scale=1.0, softcap=5.0, sinks=(0.0,) * 8, slopes=(0.5,) * 8)
    wide = replace(full, v_dim=64)
    more = replace(full, q_heads=16)

    groups = KVLayout(
        layers=(full, sliding, other, wide, sliding, more, replace(full, chunk=100)), dtype="float16"
    ).groups

    assert groups == (
        LayerGroup((0, 2, 5), None, None, 2, 64, 32),
        LayerGroup((1, 4), 100, None, 2, 64, 32),
        LayerGroup((3,), None, None, 2, 64, 64),
        LayerGroup((6,), None, 100, 2, 64, 32),
    )


def test_rows_count_their_tokens() -> None:
    assert Rows((Run(7, 3, 1), Run(2, 0, 5))).tokens == 6


@pytest.mark.parametrize("runs", [(), (Run(0, -1, 1),), (Run(0, 0, 0),), (Run(3, 0, 2), Run(4, 0, 1), Run(3, 2, 1))])
def test_impossible_rows_are_refused(runs: tuple[Run, ...]) -> None:
    """No run, a negative start, no token, and two runs of one sequence."""
    with pytest.raises(UsageError, match=r"expected|need"):
        Rows(runs)


def test_the_package_is_cheap_to_import() -> None:
    """A process that needs only shapes and layouts, such as the command line, does not load torch."""
    code = "import sys; from lamina.attention import KVLayout, Rows, create_backend; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_lists_what_it_has() -> None:
    for name in lamina.attention.__all__:
        assert getattr(lamina.attention, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'attention'"):
        _ = lamina.attention.attention
