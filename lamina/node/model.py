"""Open the model that a compute node serves, and fit it to the cluster file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from lamina.attention import KVLayout, LayerShape
from lamina.compute.forward import ForwardPass
from lamina.compute.schedule import Schedule
from lamina.config import ClusterConfig
from lamina.errors import ConfigError
from lamina.front.members import Members
from lamina.model.capture import capture
from lamina.model.checkpoint import Checkpoint, check_checkpoint
from lamina.model.slices import Blueprint, SlicedModel, carry_shapes, cut_into_slices
from lamina.model.weights import load_weights, read_sinks
from lamina.wire.geometry import aligned

log = logging.getLogger("lamina.compute")

BLOCK_TOKENS = 16
"""The number of tokens of a block of the KV cache."""

_IDLE = "each batch runs on one replica, so some are idle; set pipeline.batches to twice the number of replicas"
_ROTATION = (
    "layers change nodes from step to step, so long prompts are slow: all but their first chunks attend on the memory "
    "nodes; set pipeline.batches to a multiple of the number of replicas to avoid that"
)


@dataclass(frozen=True)
class ModelFacts:
    """Holds what the cluster needs to know about a model."""

    path: Path
    """The directory of its tokenizer."""
    fingerprint: str
    """Models with equal fingerprints have equal weights."""
    dtype: str
    """The type in which it runs."""
    layers: tuple[LayerShape, ...]
    """The attention of each layer."""
    max_context: int
    vocabulary: int
    stop_tokens: frozenset[int]
    repetition_penalty: float = 1.0
    """What requests have that name none."""


class ModelSource(Protocol):
    """Describes a model before its weights are loaded. Its methods are called within operations of the device."""

    @property
    def facts(self) -> ModelFacts:
        """Return what the cluster needs to know."""

    def carry_bytes(self, tokens: int) -> int:
        """Return the most bytes that a slice of ``tokens`` tokens hands over to another compute node: its carry, and
        the attention of rows of prompts."""

    def load(self, slices: range, device: torch.device) -> ForwardPass:
        """Load the weights of some slices, and return their forward pass."""


OpenModel = Callable[[ClusterConfig], ModelSource]
"""Opens the model of a cluster file, as `open_checkpoint` does."""


class CheckpointModel:
    """Serves a checkpoint of the `transformers` library, cut into slices."""

    def __init__(self, blueprint: Blueprint, *, compiled: bool) -> None:
        """``compiled`` compiles the slices where they run on a CPU."""
        self._blueprint = blueprint
        self._compiled = compiled
        checkpoint = blueprint.capture.checkpoint
        self.facts = ModelFacts(
            path=checkpoint.path,
            fingerprint=checkpoint.fingerprint,
            dtype=checkpoint.dtype,
            layers=tuple(blueprint.capture.shapes),
            max_context=checkpoint.max_context,
            vocabulary=checkpoint.vocabulary,
            stop_tokens=checkpoint.stop_tokens,
            repetition_penalty=checkpoint.repetition_penalty,
        )

    def carry_bytes(self, tokens: int) -> int:
        """See `ModelSource.carry_bytes`."""
        most = 0
        for piece in self._blueprint.slices[:-1]:
            shapes = carry_shapes(piece.carry, tokens)
            nbytes = sum(aligned(torch.Size(shape).numel() * dtype.itemsize) for shape, dtype in shapes)
            most = max(most, nbytes + aligned(piece.sizes.o * tokens))
        return most

    def load(self, slices: range, device: torch.device) -> ForwardPass:
        """See `ModelSource.load`; errors are those of the checkpoint."""
        first, last = slices.start, slices.stop - 1
        with torch.inference_mode(False):
            weights = load_weights(self._blueprint.capture, self._blueprint.weights_of(first, last), device)
            return SlicedModel(self._blueprint, weights, device, first, last, compiled=self._compiled)


def open_checkpoint(config: ClusterConfig) -> CheckpointModel:
    """Check the file's checkpoint and cut the model. Errors are those of checkpoint and capture."""
    check_checkpoint(config.model_path)
    with torch.inference_mode(False):
        captured = read_sinks(capture(Checkpoint.open(config.model_path, config.model.dtype)))
        blueprint = cut_into_slices(captured)
    return CheckpointModel(blueprint, compiled=config.model.compile)


@dataclass(frozen=True)
class ServedModel:
    """Holds a model as a cluster serves it."""

    source: ModelSource
    schedule: Schedule
    context: int
    """The most tokens of one request."""
    kv_dtype: str
    """The type in which memory nodes store keys and values."""

    @property
    def facts(self) -> ModelFacts:
        """Return the facts about the model."""
        return self.source.facts

    def schedule_of(self, members: Sequence[int]) -> Schedule | None:
        """Return how steps are divided over these compute nodes alone; None if they do not have all layers."""
        whole = self.schedule
        if whole.first_layers is not None:
            return whole if set(whole.members) == set(members) else None
        return replace(whole, members=tuple(members)) if members else None

    @property
    def knows_positions(self) -> bool:
        """Return whether the attention of any layer depends on positions, as with sliding windows."""
        return any(layer.knows_positions for layer in self.facts.layers)

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes of keys and values of one position, in all layers and heads."""
        return self.layout(self.facts.layers).bytes_per_token

    def layout(self, layers: tuple[LayerShape, ...]) -> KVLayout:
        """Return the layout in which a memory node stores these heads of the model's layers."""
        return KVLayout(layers=layers, dtype=self.kv_dtype, block_tokens=BLOCK_TOKENS)


def serve_model(config: ClusterConfig, members: Members, source: ModelSource) -> ServedModel:
    """Check that file and model fit each other. A ConfigError says where they do not."""
    facts, pipeline = source.facts, config.pipeline
    ranges = [node.layers for node in config.compute_nodes]
    given = [r for r in ranges if r is not None]
    if given and given[-1].stop != len(facts.layers):
        raise ConfigError(
            f"{config.file}: node {config.compute_nodes[-1].name}: layers: the last compute node ends "
            f"with layer {given[-1].stop - 1}, the model with layer {len(facts.layers) - 1}"
        )
    firsts = tuple(r.start for r in given) if given else None
    asked, most = config.model.context, facts.max_context
    if asked is not None and asked > most:
        raise ConfigError(f"{config.file}: model.context: {asked} is more than the context of the model, {most}")
    served = ServedModel(
        source,
        Schedule(len(facts.layers), members.of_role("compute"), pipeline.batches, firsts),
        asked or most,
        config.model.kv_dtype or facts.dtype,
    )
    if pipeline.partition == "tokens" and served.knows_positions:
        raise ConfigError(
            f'{config.file}: pipeline.partition: "tokens" is not possible for a model with sliding windows, '
            'chunks or ALiBi; use "heads" or "requests"'
        )
    replicas = len(served.schedule.members)
    if firsts is None and replicas > pipeline.batches:
        log.warning("event=idle_replicas replicas=%d batches=%d reason=%r", replicas, pipeline.batches, _IDLE)
    if not served.schedule.is_settled:
        log.warning("event=rotation replicas=%d batches=%d reason=%r", replicas, pipeline.batches, _ROTATION)
    return served
