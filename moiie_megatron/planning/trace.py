"""What one rank did in one step, in numbers: the result of a simulated or a real step.

Plain values without torch, which are also written as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

# What tensors, kernels and collectives belong to.
Part = Literal[
    "vision",  # the vision encoder
    "connector",
    "embedding",
    "attention",  # with its norm
    "dense_ffn",  # with its norm
    "router",
    "dispatch",  # rows on their way to experts and back
    "experts",
    "output_layer",  # logits and cross-entropy
    "optimizer",  # gradient norm and update
    "other",
]
PARTS: Final[tuple[Part, ...]] = (
    *("vision", "connector", "embedding", "attention", "dense_ffn", "router", "dispatch"),
    *("experts", "output_layer", "optimizer", "other"),
)

# When: a layer that is recomputed runs forward a second time within the backward pass.
Pass = Literal["forward", "recompute", "backward", "update"]


@dataclass(frozen=True)
class Compute:
    """All kernels of one part in one pass, over the traced micro-batches.

    Attributes:
        flops: Of matrix products and attention.
        bytes: Read and written by all kernels, each tensor once per kernel.
        matmul_bytes: Those of the kernels that ``flops`` counts.
        kernels: Number of operations.
    """

    part: Part
    when: Pass
    flops: int
    bytes: int
    matmul_bytes: int
    kernels: int


@dataclass(frozen=True)
class Transfer:
    """All calls of one collective in one group, over the traced micro-batches.

    Attributes:
        operation: ``all_reduce``, ``all_gather_single``, ``reduce_scatter_single``,
            ``all_to_all_single``, ``broadcast``, ``send``, ``recv``, ...
        group: ``tp``, ``ep``, ``expt_tp``, ``tp_ep``, ``pp``, ``dp``, ``expt_dp``, ``embd``,
            ``world``: which process group.
        members: Ranks of the job in it.
        when: ``update`` for those outside the schedule of micro-batches.
        per_micro_batch: Whether every micro-batch repeats them (gradients are reduced once).
        calls: Number of calls.
        bytes_sent: Bytes that leave this rank, by the ring algorithm for a reduction or gather:
            (n - 1) / n of the whole, twice for an all-reduce; only other ranks' rows of an
            all-to-all.
    """

    operation: str
    group: str
    members: tuple[int, ...]
    when: Pass
    per_micro_batch: bool
    calls: int
    bytes_sent: int


@dataclass(frozen=True)
class MemorySample:
    """Bytes of tensors at one moment of the step.

    Attributes:
        when: The pass at that moment.
        micro_batch: Its number, from 0, for that pass; the last one in the update.
        activations: Bytes by part, of everything that is not weights, gradients or optimizer.
    """

    when: Pass
    micro_batch: int
    activations: Mapping[Part, int]

    @property
    def total(self) -> int:
        return sum(self.activations.values())


@dataclass(frozen=True)
class MemoryTrace:
    """Bytes of tensors on one rank.

    Attributes:
        weights: Parameters and buffers in the dtype of the run.
        gradients: The buffers that gradients are reduced in.
        optimizer: fp32 weights and both moments of the part that this rank updates.
        peak: The moment of the step with the most activations.
        timeline: The step from begin to end; keeps the peaks, at most some hundred samples.
    """

    weights: int
    gradients: int
    optimizer: int
    peak: MemorySample
    timeline: tuple[MemorySample, ...]

    @property
    def states(self) -> int:
        """What is there all the time."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Largest number of bytes at once."""
        return self.states + self.peak.total


@dataclass(frozen=True)
class RankTrace:
    """One rank in one step.

    Attributes:
        rank: In the job.
        world: Number of ranks of the job.
        stage: Pipeline stage of the rank, from 0.
        micro_batches: How many were traced; a step may have more of them.
        compute: By part and pass.
        transfers: By collective, group and pass.
        memory: Bytes of tensors.
        expert_rows: By MoE layer (from 0) of this rank: rows of each local expert, of all traced
            micro-batches, in physical order.
    """

    rank: int
    world: int
    stage: int
    micro_batches: int
    compute: tuple[Compute, ...]
    transfers: tuple[Transfer, ...]
    memory: MemoryTrace
    expert_rows: Mapping[int, tuple[int, ...]]
