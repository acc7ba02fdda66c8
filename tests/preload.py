"""What node processes of the tests share: everything that starting a node imports, imported once before they fork.

Capturing a model loads much of torch on its first use, hence one capture, of a model with random weights that is never
run. Nothing here may start a thread: threads do not survive a fork.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lamina.cli
import lamina.node.compute
import lamina.node.memory
from lamina.model.capture import capture
from lamina.model.checkpoint import Checkpoint
from lamina.model.slices import cut_into_slices
from tests.families import FAMILIES

torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    FAMILIES["llama"].config().save_pretrained(folder)
    cut_into_slices(capture(Checkpoint.open(Path(folder), "float32")))

__all__ = ["AutoModelForCausalLM", "AutoTokenizer", "lamina"]
