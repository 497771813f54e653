"""What one rank holds of the model: a chunk for each of its virtual pipeline stages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from moiie_megatron.vlm.model import MoIIEModel


class ModelChunks(torch.nn.ModuleList):
    """The chunks of this rank in the order of the model; one without virtual stages.

    Names of parameters and of entries of the state begin with the number of their chunk.  The
    names of tensors in checkpoints have the layer's number in the whole model instead
    (``ShardedTensor.key``): they do not depend on the stages.
    """

    def __iter__(self) -> Iterator[MoIIEModel]:
        return cast(Iterator[MoIIEModel], super().__iter__())

    @property
    def num_tokens(self) -> int:
        """Rows of the embedding table that are tokens."""
        return next(iter(self)).num_tokens

    @property
    def groups(self) -> ProcessGroupCollection:
        """Megatron's process groups."""
        return next(iter(self)).groups

    def sharded_state_dict(self, *, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """The entries of all chunks, which ``load_state_dict`` takes back."""
        return {
            f"{number}.{name}": entry
            for number, chunk in enumerate(self)
            for name, entry in chunk.sharded_state_dict(metadata=metadata).items()
        }


# Either has a ``sharded_state_dict`` of everything in it.
ModelPart = MoIIEModel | ModelChunks
