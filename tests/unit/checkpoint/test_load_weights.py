"""Weights of a checkpoint in models whose modules hold them differently."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from moiie_megatron.checkpoint.load_weights import load_weights
from moiie_megatron.convert.dcp.reader import CheckpointReader
from moiie_megatron.convert.upcycle import UpcycleOptions, upcycle_checkpoint
from moiie_megatron.mcore.parallel import ParallelContext
from tests.helpers.tiny_hf import write_language, write_vision

FC2 = "language_model.decoder.layers.1.mlp.experts.experts.linear_fc2.weight"


def test_experts_that_are_parameters_of_their_own(tmp_path: Path, context: ParallelContext) -> None:
    """As in Transformer Engine's grouped linear layer: one weight per expert, without its axis."""
    vision = write_vision(tmp_path / "vision", dtype=torch.float32)
    llm = write_language(tmp_path / "llm", "llama", torch.float32)
    options = UpcycleOptions(perturb=0.1)
    checkpoint = upcycle_checkpoint(llm, vision, tmp_path / "checkpoint", options)
    written = CheckpointReader(checkpoint).get(FC2)
    experts = [torch.nn.Parameter(torch.zeros_like(part)) for part in written]
    assert len(experts) == 4

    def sharded_state_dict(metadata: Any) -> dict[str, ShardedTensor]:
        return {
            f"weight{number}": ShardedTensor.from_rank_offsets(
                FC2, weight, (0, number, len(experts)), replica_id=(0, 0, 0), prepend_axis_num=1
            )
            for number, weight in enumerate(experts)
        }

    load_weights(checkpoint, context, SimpleNamespace(sharded_state_dict=sharded_state_dict))
    for number, weight in enumerate(experts):
        assert torch.equal(weight, written[number])
    assert not torch.equal(written[0], written[1])
