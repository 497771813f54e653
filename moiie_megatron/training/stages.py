"""The parts of the model, and which of them a stage trains.

A stage is data (``stage:`` in the configuration): parts with a learning rate train, the others
are frozen.  Stage 1 trains the connector alone, stage 2 everything (paper, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import torch

from moiie_megatron.config.schema import Part, StageConfig
from moiie_megatron.vlm.chunks import ModelChunks
from moiie_megatron.vlm.model import MoIIEModel

PARTS: tuple[Part, ...] = get_args(Part)


def part_mark(part: Part) -> str:
    """The attribute that marks the parameters of a part, for the optimizer's groups."""
    return f"moiie_part_{part}"


def part_of(name: str) -> Part:
    """The part that a parameter of ``MoIIEModel`` belongs to, by its name."""
    if name.startswith("vision_encoder."):
        return "vision"
    if name.startswith("connector."):
        return "connector"
    if ".mlp.router." in name or ".mlp.experts." in name:
        return "moe"
    return "language"


def named_parts(model: MoIIEModel) -> Iterator[tuple[Part, str, torch.nn.Parameter]]:
    """Every parameter of a chunk with its part and name."""
    for name, parameter in model.named_parameters():
        yield part_of(name), name, parameter


def apply_stage(chunks: ModelChunks, stage: StageConfig) -> None:
    """Freeze the parts that the stage does not train, and mark every parameter with its part.

    Must run before the model is wrapped for data parallelism, whose gradient buffers cover the
    parameters that train.
    """
    for model in chunks:
        after_features: set[int] = set()
        if model.vision_encoder is not None:
            used = {id(p) for p in model.vision_encoder.trainable_parameters()}
            after_features = {id(p) for p in model.vision_encoder.parameters()} - used
        for part, _, parameter in named_parts(model):
            setattr(parameter, part_mark(part), True)
            trains = part in stage.learning_rates and id(parameter) not in after_features
            parameter.requires_grad_(trains)
