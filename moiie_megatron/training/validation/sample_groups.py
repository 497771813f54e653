"""Which source a held-out sample is of, and how many images it has: the groups of its losses.

Shapes: ``moiie_megatron/data/__init__.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moiie_megatron.data.encode.encoder import IGNORE
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.held_out import HeldOut
from moiie_megatron.layout.token_types import IMAGE, PADDING
from moiie_megatron.training.validation.result import COUNTS, IMAGE_COUNTS


class SampleGroups:
    """Groups the tokens of micro-batches (``training/step.py``): by source and number of images.

    Group ``len(IMAGE_COUNTS) * source + min(images, 2)``.  Fillers and padding are in none.

    Args:
        samples: The held-out samples.
    """

    def __init__(self, samples: HeldOut) -> None:
        self._samples = samples

    @property
    def count(self) -> int:
        """Number of groups."""
        return len(self._samples.counts) * len(IMAGE_COUNTS)

    def of(self, batch: Batch) -> Tensor:
        """int64 ``(b, s)``: the group of every token."""
        groups = self._of_samples(batch)
        if batch.cu_seqlens is None:
            return groups.unsqueeze(1).expand(batch.tokens.shape)
        # Padding segments lie behind those of the samples.
        lengths = batch.cu_seqlens.diff()
        padded = torch.nn.functional.pad(groups, (0, len(lengths) - len(groups)), value=-1)
        return padded.repeat_interleave(lengths).unsqueeze(0)

    def counts(self, batch: Batch) -> Tensor:
        """fp64 ``(len(COUNTS), groups)``: what there is of every group in a micro-batch."""
        group_bs = self.of(batch)
        samples = self._of_samples(batch)
        masks = {
            "label_tokens": batch.labels != IGNORE,
            "tokens": batch.token_types != PADDING,
            "image_tokens": batch.token_types == IMAGE,
        }
        found = {"samples": samples} | {name: group_bs[mask] for name, mask in masks.items()}
        return torch.stack(
            [
                # A place of its own for those in no group, which is then left out.
                torch.bincount(found[name] + 1, minlength=self.count + 1)[1:].double()
                for name in COUNTS
            ]
        )

    def _of_samples(self, batch: Batch) -> Tensor:
        """int64 (samples,): the group of every sample of a micro-batch, -1 for none."""
        is_image = (batch.token_types == IMAGE).long()
        if batch.cu_seqlens is None:
            image_tokens = is_image.sum(dim=1)
        else:
            before = torch.nn.functional.pad(is_image.flatten().cumsum(0), (1, 0))
            image_tokens = before.index_select(0, batch.cu_seqlens).diff()
        images = (image_tokens // batch.num_image_tokens).tolist()
        return torch.tensor(
            [
                self._group(int(number), count) if number else -1
                for number, count in zip(batch.record_ids, images, strict=False)
            ]
        )

    def _group(self, number: int, images: int) -> int:
        image_count = min(images, len(IMAGE_COUNTS) - 1)
        return len(IMAGE_COUNTS) * self._samples.source_of(number) + image_count
