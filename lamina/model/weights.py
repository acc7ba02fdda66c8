"""Load the tensors that a range of slices reads, with the library's own names and conversions.

Checkpoints differ in how they name and lay out their tensors, for example with separate experts or fused projections.
The ``transformers`` library converts them into the tensors of its modules. This module uses its conversions, but only
for the tensors that are needed. Buffers that no checkpoint holds, such as rotary frequencies, are computed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lamina.errors import CheckpointError, UnsupportedModelError
from lamina.model.capture import Capture
from lamina.model.library import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def load_weights(captured: Capture, names: Collection[str], device: torch.device) -> dict[str, Tensor]:
    """Load the parameters and buffers ``names`` of ``captured`` to ``device``.

    CheckpointError names a tensor that is missing, has the wrong shape, or is not used by the model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    module, path = captured.module, captured.checkpoint.path
    computed = {name for name, _ in module.named_non_persistent_buffers()}
    mapping = get_model_conversion_mapping(module)
    targets = _targets(module, captured.checkpoint.tensor_files, mapping)
    unused = sorted(name for name, made in targets.items() if not made and not _ignored(module, name))
    if unused:
        raise CheckpointError(f"{path}: {_some(unused)} in the checkpoint but not used by {type(module).__name__}")

    stored = {name for made in targets.values() for name in made}
    # A tied tensor may be stored under any of its names; all are read, because they may contradict each other.
    holders = {n: [t for t in _tied(module, n) if t in stored] or [n] for n in names if n not in computed}
    read = _read(captured, {h for some in holders.values() for h in some}, targets, mapping, device)
    weights = {name: _computed_buffer(module, name, path).to(device) for name in names if name in computed}
    for name, (first, *others) in holders.items():
        for other in others:
            if not read[first].equal(read[other]):
                raise CheckpointError(
                    f"{path}: tensors {first} and {other} differ, but config.json says that they are tied"
                )
        weights[name] = read[first]
    return weights


def read_sinks(captured: Capture) -> Capture:
    """Return ``captured`` with the sinks of its attention, which are weights that memory nodes need. Errors are those
    of `load_weights`."""
    weights = load_weights(captured, {name for name in captured.sinks if name}, torch.device("cpu"))
    sinks = [None if name is None else tuple(weights[name].tolist()) for name in captured.sinks]
    shapes = [replace(shape, sinks=own) for shape, own in zip(captured.shapes, sinks, strict=True)]
    return replace(captured, shapes=tuple(shapes))


def _read(
    captured: Capture, wanted: set[str], targets: dict[str, set[str]], mapping: list[Any], device: torch.device
) -> dict[str, Tensor]:
    """Read and convert the checkpoint tensors from which the module's tensors ``wanted`` are made."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    module, checkpoint = captured.module, captured.checkpoint
    path, dtype = checkpoint.path, getattr(torch, checkpoint.dtype)
    # The library loads into the module; a copy keeps the captured module on the meta device.
    loaded = copy.deepcopy(module)
    settings = LoadStateDictConfig(
        dtype=dtype, dtype_plan=module._get_dtype_plan(dtype), device_map={"": device}, weight_mapping=mapping
    )
    with checkpoint.tensors() as tensors, quiet():
        needed = {name: tensors[name] for name, made in targets.items() if made & wanted}
        report, _ = convert_and_load_state_dict_in_model(loaded, needed, settings)
    if report.conversion_errors:
        name, error = next(iter(report.conversion_errors.items()))
        reason = error.strip().splitlines()[-1]
        raise CheckpointError(f"{path}: tensor {name} cannot be made from the checkpoint: {reason}")
    for name, found, expected in sorted(report.mismatched_keys):
        if name in wanted:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {tuple(found)}, config.json asks for {tuple(expected)}"
            )
    missing = sorted(wanted & report.missing_keys)
    if missing:
        raise CheckpointError(f"{path}: {_some(missing)} missing from the checkpoint")
    return {name: loaded.get_parameter_or_buffer(name).detach() for name in wanted}


def _tied(module: PreTrainedModel, name: str) -> list[str]:
    """Return all names of the tensor ``name``, including ``name``."""
    source = module.all_tied_weights_keys.get(name, name)
    return [source, *(target for target, other in module.all_tied_weights_keys.items() if other == source)]


def _targets(module: PreTrainedModel, names: Iterable[str], mapping: list[Any]) -> dict[str, set[str]]:
    """Return for each checkpoint tensor the names of the module's tensors that are made from it, if any."""
    from transformers.core_model_loading import WeightConverter, rename_source_key

    renamings = [m for m in mapping if not isinstance(m, WeightConverter)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: m for m in converters for pattern in m.source_patterns}
    state = module.state_dict()
    targets = {}
    for name in names:
        first, pattern = rename_source_key(name, renamings, converters, module.base_model_prefix, state)
        made = {first}
        if pattern is not None:
            patterns = by_pattern[pattern].target_patterns
            made |= {first.replace(patterns[0], other) for other in patterns}
        elif first not in state and name in state:
            made = {name}
        targets[name] = made & state.keys()
    return targets


def _ignored(module: PreTrainedModel, name: str) -> bool:
    """Return whether the library itself ignores this tensor, as it does for some of old checkpoints."""
    patterns = [
        *(module._keys_to_ignore_on_load_unexpected or ()),
        r"rotary_emb\.inv_freq",
        r"(^|\.)position_ids$",
    ]
    return any(re.search(pattern, name) for pattern in patterns)


def _computed_buffer(module: PreTrainedModel, name: str, path: Path) -> Tensor:
    """Compute a buffer that is not in checkpoints, with the library's initialisation of its owner."""
    owner_name, _, leaf = name.rpartition(".")
    owner = copy.copy(module.get_submodule(owner_name))
    initialiser = _initialiser(module, owner_name)
    buffers = dict(owner._buffers)
    values = []
    for filler in (0, 1):
        owner._buffers = {
            k: None if b is None else torch.full(b.shape, filler, dtype=b.dtype) for k, b in buffers.items()
        }
        initialiser._init_weights(owner)
        values.append(owner._buffers[leaf])
    value: Tensor | None
    value, again = values
    # What was computed does not depend on what was there.
    if value is None or again is None or not value.equal(again):
        raise UnsupportedModelError(
            f"{path}: the buffer {name} is in no checkpoint, and the library does not say how to compute it"
        )
    return value


def _initialiser(module: PreTrainedModel, name: str) -> PreTrainedModel:
    """Return the innermost model around the module ``name``, or it itself, which initialises it in the library."""
    found, inner = module, module
    for part in filter(None, name.split(".")):
        inner = getattr(inner, part)
        if hasattr(inner, "_init_weights"):
            found = inner
    return found


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {shown}{more} {'are' if len(names) > 1 else 'is'}"
