from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import lamina.attention
from lamina.attention import KVLayout, LayerShape, Rows, Run
from lamina.errors import ConfigError, UsageError

SHAPE: dict[str, Any] = {"q_heads": 8, "kv_heads": 2, "qk_dim": 64, "v_dim": 32, "scale": 0.125}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("q_heads", 0),
        ("kv_heads", -1),
        ("kv_heads", 3),
        ("qk_dim", 1.5),
        ("v_dim", 0),
        ("scale", float("nan")),
        ("window", 0),
        ("softcap", 0.0),
        ("softcap", float("inf")),
    ],
)
def test_an_impossible_layer_is_refused_by_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^LayerShape\.{field}: expected .* got {value}$"):
        LayerShape(**{**SHAPE, field: value})


@pytest.mark.parametrize(("field", "value"), [("layers", ()), ("dtype", "int8"), ("block_tokens", 0)])
def test_an_impossible_layout_is_refused_by_field(field: str, value: object) -> None:
    layout: dict[str, Any] = {"layers": (LayerShape(**SHAPE),), "dtype": "float16"}
    with pytest.raises(ConfigError, match=rf"^KVLayout\.{field}: expected "):
        KVLayout(**{**layout, field: value})


def test_a_layout_counts_keys_and_values_of_all_its_layers() -> None:
    wide = LayerShape(q_heads=4, kv_heads=4, qk_dim=192, v_dim=128, scale=1.0)
    layout = KVLayout(layers=(LayerShape(**SHAPE), wide), dtype="bfloat16", block_tokens=32)

    assert layout.bytes_per_token == 2 * (2 * (64 + 32) + 4 * (192 + 128))
    assert layout.bytes_per_block == 32 * layout.bytes_per_token


def test_rows_count_their_tokens() -> None:
    assert Rows((Run(7, 3, 1), Run(2, 0, 5))).tokens == 6


@pytest.mark.parametrize("runs", [(), (Run(0, -1, 1),), (Run(0, 0, 0),), (Run(3, 0, 2), Run(4, 0, 1), Run(3, 2, 1))])
def test_impossible_rows_are_refused(runs: tuple[Run, ...]) -> None:
    """No run, a negative start, no token, and two runs of one sequence."""
    with pytest.raises(UsageError, match=r"expected|need"):
        Rows(runs)


def test_the_package_is_cheap_to_import() -> None:
    """Whoever needs only shapes and layouts, the command line for one, does not load torch."""
    code = "import sys; from lamina.attention import KVLayout, Rows, create_backend; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_lists_what_it_has() -> None:
    for name in lamina.attention.__all__:
        assert getattr(lamina.attention, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'attention'"):
        _ = lamina.attention.attention
