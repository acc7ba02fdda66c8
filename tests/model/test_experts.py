"""The experts operator against the library's own loop over experts."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from transformers import AutoConfig

from lamina.model import operators

# Gate and up fused; with biases and transposed weights; without a gate.
KINDS = {
    "mixtral": "MixtralExperts",
    "gpt_oss": "GptOssExperts",
    "nemotron_h": "NemotronHExperts",
}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 48}
EXPERTS = 6


@pytest.fixture(params=KINDS)
def module(request):
    """The experts of one layer, random, run by the library's own loop."""
    config = AutoConfig.for_model(request.param, **SMALL, num_local_experts=EXPERTS, n_routed_experts=EXPERTS)
    library = import_module(f"transformers.models.{request.param}.modeling_{request.param}")
    module = getattr(library, KINDS[request.param])(config)
    module.config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


def test_only_experts_that_are_hit_are_read(module):
    """The sum over the chosen experts is the library's, although every other expert is poisoned."""
    operators.install()
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(5, SMALL["hidden_size"], generator=generator)
    chosen = torch.tensor([[0, 3], [3, 5], [5, 0], [0, 5], [3, 0]])
    weights = torch.rand(chosen.shape, generator=generator)
    ours = copy.deepcopy(module)
    ours.config._experts_implementation = operators.NAME
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter[[1, 2, 4]] = torch.nan

        out = ours(hidden, chosen, weights)
        want = module(hidden, chosen, weights)

    torch.testing.assert_close(out, want)
