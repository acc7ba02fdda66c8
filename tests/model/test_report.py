"""The report of a checkpoint: figures that can be checked by hand."""

from __future__ import annotations

import json

import pytest

from lamina.errors import UsageError
from lamina.model.report import report
from tests.families import FAMILIES


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The report of a directory that has a configuration and no weights."""
    path = tmp_path_factory.mktemp("llama-small")
    FAMILIES["llama"].config().save_pretrained(path)
    return report(path, "bfloat16", 10, 2.0)


def test_figures_are_those_of_the_formula(llama):
    """Per layer (2 + 2/G) e d bytes per token, times layers and batch, over a fifth of the step (section 3.1)."""
    config = FAMILIES["llama"].config()
    layers, hidden, group = config.num_hidden_layers, config.hidden_size, 2

    assert llama.slices == layers + 1
    assert llama.attention_bytes == layers * (2 + 2 / group) * 2 * hidden
    assert llama.kv_bytes == layers * 2 / group * 2 * hidden
    assert llama.bandwidth == pytest.approx(llama.attention_bytes * 10 / (0.2 * 0.002))


def test_parameters_are_those_of_the_model(llama):
    """Groups of equal slices add up to the model of the library."""
    expected = sum(p.numel() for p in FAMILIES["llama"].model().parameters())

    assert llama.parameters == expected
    assert llama.parameter_bytes == 2 * expected
    assert sum((g.last - g.first + 1) * g.sizes.parameters for g in llama.groups) == expected
    assert [(g.first, g.last) for g in llama.groups] == [(0, 0), (1, 3), (4, 4)]


def test_tied_parameters_count_once(tmp_path):
    """Both ends of a tied model hold the embedding, but the model has it once."""
    FAMILIES["llama_tied"].config().save_pretrained(tmp_path)

    found = report(tmp_path, None, 1, 1.0)

    assert found.parameters == sum(p.numel() for p in FAMILIES["llama_tied"].model().parameters())


def test_report_is_printed_and_written_as_json(llama, capsys):
    """The table names the groups and the paper; the JSON object holds plain values."""
    llama.print_tables()
    text = capsys.readouterr().out

    assert "1-3" in text
    assert "arXiv 2405.01814" in text
    assert json.loads(json.dumps(llama.as_json()))["bandwidth_bytes_per_s"] == llama.bandwidth


@pytest.mark.parametrize(("batch", "step_ms"), [(0, 1.0), (1, 0.0), (1, float("nan"))])
def test_impossible_settings_are_usage_errors(batch, step_ms, tmp_path):
    """A batch of nothing or a step of no time asks for no bandwidth at all."""
    with pytest.raises(UsageError, match=r"batch|step_ms"):
        report(tmp_path, None, batch, step_ms)
