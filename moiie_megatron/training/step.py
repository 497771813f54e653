"""One optimizer step: micro-batches through Megatron's pipeline schedule, clip, update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.layout.token_types import IMAGE
from moiie_megatron.mcore.packed_sequences import segments_of
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.planning.flops import Work
from moiie_megatron.training.state import TrainState
from moiie_megatron.vlm.chunks import ModelChunks
from moiie_megatron.vlm.image_split import pixels_of_rank


@dataclass(frozen=True)
class StepResult:
    """What a step did; equal on every rank but for ``micro_batch_losses``.

    Attributes:
        lm_loss: Cross-entropy averaged over the label tokens of the global batch.
        learning_rates: What the step used, by part.
        grad_norm: Norm of the gradient before clipping.
        label_tokens: Tokens with a label in the global batch.
        tokens: Tokens of the global batch, without padding.
        image_tokens: How many of them are image tokens.
        positions: Tokens of the global batch, with padding.
        squared_lengths: Sum of the squares of the lengths of its samples.
        updated: False if loss or gradient was not finite: the step has changed nothing.
        also_summed: The sums over all ranks of ``also_sum`` (see ``train_step``).
        micro_batch_losses: fp32, the summed token losses of each of this rank's micro-batches, 0
            before the last stage.
    """

    lm_loss: float
    learning_rates: dict[str, float]
    grad_norm: float
    label_tokens: int
    tokens: int
    image_tokens: int
    positions: int
    squared_lengths: int
    updated: bool
    also_summed: list[float]
    micro_batch_losses: Tensor

    def work(self, num_image_tokens: int) -> Work:
        """What the model had to process, with so many tokens per image."""
        return Work(
            tokens=self.tokens,
            labels=self.label_tokens,
            images=self.image_tokens // num_image_tokens,
            squared_lengths=self.squared_lengths,
        )


def forward_inputs(
    config: RunConfig, batch: Batch, context: ParallelContext, chunk: torch.nn.Module
) -> dict[str, Any]:
    """The arguments of a chunk of the model for a micro-batch, on the device.

    Every pipeline stage gets the token types and the segments of a packed row; images only the
    first one (this tensor-parallel rank's part), labels only the last one.

    Args:
        chunk: A ``MoIIEModel`` or its data-parallel wrapper.
    """
    first, last = (get_attr_wrapped_model(chunk, name) for name in ("pre_process", "post_process"))
    move = context.device.copy
    return {
        "tokens": move(batch.tokens),
        "position_ids": move(batch.position_ids),
        "token_types": move(batch.token_types),
        "images": pixels_of_rank(batch.images, config.vision, context) if first else None,
        "image_positions": move(batch.image_positions) if first else None,
        "labels": move(batch.labels) if last else None,
        "label_positions": move(batch.label_positions) if last else None,
        "packed_seq_params": (
            None if batch.cu_seqlens is None else segments_of(batch.cu_seqlens, context.device)
        ),
    }


class TokenGroups(Protocol):
    """Groups of tokens, whose losses are summed apart."""

    @property
    def count(self) -> int:
        """Number of groups."""

    def of(self, batch: Batch) -> Tensor:
        """int64 ``(b, s)`` on the CPU: the group of every token, -1 for none."""


def run_schedule(
    config: RunConfig,
    context: ParallelContext,
    chunks: Iterable[torch.nn.Module],
    batches: list[Batch],
    *,
    loss_scale: float,
    forward_only: bool = False,
    groups: TokenGroups | None = None,
) -> Tensor:
    """Forward (and backward) of all micro-batches through Megatron's schedule.

    Args:
        chunks: The data-parallel wrappers of this rank's chunks, or the bare chunks with
            ``forward_only``.
        batches: A multiple of ``config.micro_batches_multiple_of``.
        loss_scale: Factor on the summed token losses of every micro-batch.
        groups: Sum the losses of these groups apart.

    Returns:
        fp32, the summed token losses of each of this rank's micro-batches (0 before
        the last stage); with groups fp64 ``(micro-batches, groups)``.
    """

    def loss_function(batch: Batch, losses_bs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        total = losses_bs.float().sum()
        sums = total.detach() if groups is None else _sum_groups(groups, batch, losses_bs, context)
        return total * loss_scale, {"loss_sum": sums}

    def forward_step(data: Iterator[Batch], chunk: Any) -> tuple[Tensor, partial[Any]]:
        batch = next(data)
        inputs = forward_inputs(config, batch, context, chunk)
        return chunk(**inputs), partial(loss_function, batch)

    model = list(chunks)
    rows, length = config.micro_batch_shape
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in model],
        model=model,
        num_microbatches=len(batches),
        # Only read when the micro-batches have one fixed length.
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    if reports:
        return torch.stack([report["loss_sum"] for report in reports])
    device = context.device.torch_device
    if groups is None:
        return torch.zeros(len(batches), device=device)
    return torch.zeros(len(batches), groups.count, dtype=torch.float64, device=device)


def _sum_groups(
    groups: TokenGroups, batch: Batch, losses_bs: Tensor, context: ParallelContext
) -> Tensor:
    """fp64 ``(groups,)``; a loss that is not finite spoils the sum of its own group alone."""
    group_bs = context.device.copy(groups.of(batch))
    losses = losses_bs.detach().double()
    masks = (torch.where(group_bs == group, losses, 0.0) for group in range(groups.count))
    return torch.stack([masked.sum() for masked in masks])


class TokenCounts(NamedTuple):
    """What is counted of the global batch; see ``StepResult``."""

    labels: int
    tokens: int
    image_tokens: int
    positions: int
    squared_lengths: int


def count_tokens(batches: list[Batch], context: ParallelContext) -> TokenCounts:
    """Count the global batch in one small reduction."""
    counts = torch.zeros(len(TokenCounts._fields), dtype=torch.int64)
    for batch in batches:
        lengths = batch.sample_lengths
        counts[0] += batch.num_label_tokens
        counts[1] += lengths.sum()
        counts[2] += (batch.token_types == IMAGE).sum()
        counts[3] += batch.token_types.numel()
        counts[4] += lengths.square().sum()
    counts = counts.to(context.device.torch_device)
    dist.all_reduce(counts, group=context.groups.dp)
    return TokenCounts(*counts.tolist())


def train_step(
    config: RunConfig,
    context: ParallelContext,
    train_state: TrainState,
    batches: list[Batch],
    also_sum: Callable[[], list[float]] = list,
) -> StepResult:
    """One optimizer step on this rank's micro-batches of the global batch.

    The loss is divided by the label tokens of the *global* batch, so that layout and
    accumulation do not change it.  Megatron divides by the number of micro-batches and averages
    over data parallelism; the factor below undoes both for the token losses and leaves the
    balance losses as means over micro-batches.  Every rank has the same number of micro-batches,
    and none of them is empty (packed rows: ``data/packing/deal_rows.py``).

    Args:
        also_sum: Called after the backward pass; its numbers, the same count on every rank, are
            summed over all ranks in the reduction of the loss.
    """
    learning_rates = train_state.learning_rates(config)
    counts = count_tokens(batches, context)
    for wrapper in train_state.ddp:
        wrapper.zero_grad_buffer()
    train_state.optimizer.zero_grad()
    micro_batch_losses = run_schedule(
        config,
        context,
        train_state.ddp,
        batches,
        loss_scale=len(batches) * context.dp_size / max(counts.labels, 1),
    )
    # Started before the optimizer step, read after it has synced for the gradient norm anyway.
    sums = _sum_over_ranks(micro_batch_losses, also_sum(), context)
    updated, grad_norm = train_state.optimizer.step_if(lambda: bool(sums[0].isfinite()))
    if updated:
        train_state.scheduler.step(increment=1)
    loss_sum, *also_summed = sums.tolist()
    return StepResult(
        lm_loss=loss_sum / max(counts.labels, 1),
        learning_rates=learning_rates,
        grad_norm=grad_norm,
        label_tokens=counts.labels,
        tokens=counts.tokens,
        image_tokens=counts.image_tokens,
        positions=counts.positions,
        squared_lengths=counts.squared_lengths,
        updated=updated,
        also_summed=also_summed,
        micro_batch_losses=micro_batch_losses,
    )


@torch.no_grad()
def evaluate_loss(
    config: RunConfig, context: ParallelContext, model: ModelChunks, batches: list[Batch]
) -> float:
    """The mean loss per label token over all ranks' batches, without training."""
    labels = count_tokens(batches, context).labels
    return float(sum_losses(config, context, model, batches)) / max(labels, 1)


@torch.no_grad()
def sum_losses(
    config: RunConfig,
    context: ParallelContext,
    model: ModelChunks,
    batches: list[Batch],
    *,
    groups: TokenGroups | None = None,
    also_sum: Sequence[float] = (),
) -> Tensor:
    """Sum the token losses over all ranks' batches, without training; every rank calls this.

    Args:
        groups: Sum those of each group apart.
        also_sum: Further numbers, the same count on every rank.

    Returns:
        fp64: the sum of all losses, or that of each group; then the sums of ``also_sum``.
    """
    was_training = model.training
    model.eval()
    losses = run_schedule(
        config, context, model, batches, loss_scale=1.0, forward_only=True, groups=groups
    )
    model.train(was_training)
    return _sum_over_ranks(losses, list(also_sum), context)


def _sum_over_ranks(
    micro_batch_losses: Tensor, others: list[float], context: ParallelContext
) -> Tensor:
    """fp64: the losses ``(micro-batches, ...)`` summed over the global batch, then the others."""
    total = micro_batch_losses.double().sum(dim=0)  # 0 before the last stage
    if context.groups.tp.rank() != 0:  # tensor-parallel ranks hold the same losses
        total = torch.zeros_like(total)
    sums = torch.cat([total.reshape(-1), total.new_tensor(others)])
    dist.all_reduce(sums)
    return sums
