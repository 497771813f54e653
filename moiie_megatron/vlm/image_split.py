"""The images of a micro-batch, split over tensor-parallel ranks.

Every rank has all images on the host.  It copies a part of them to its device and encodes it; one
all-gather then gives every rank the features of all images.  Each part but the last ones has
``ceil(i / TP)`` images, so that the gathered parts are in the order of the images and the padding
of shorter parts lies behind all of them:

    5 images on 4 ranks:  0 1 | 2 3 | 4 . | . .

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from moiie_megatron.config.schema import VisionConfig
from moiie_megatron.data.encode.images import normalize
from moiie_megatron.families.registry import vision_family
from moiie_megatron.mcore.parallel import ParallelContext


def images_of_rank(count: int, group: torch.distributed.ProcessGroup) -> slice:
    """Which of the ``count`` images of a micro-batch this rank of the group encodes."""
    part = -(-count // group.size())
    start, stop = (min(rank * part, count) for rank in (group.rank(), group.rank() + 1))
    return slice(start, stop)


def pixels_of_rank(images: Tensor, config: VisionConfig, context: ParallelContext) -> Tensor:
    """This rank's part of the images as the vision encoder takes them.

    Args:
        images: uint8 ``(i, 3, H, W)`` on the host, all images of the micro-batch.

    Returns:
        fp32 ``(images of this rank, 3, H, W)``, normalised, on the rank's device.
    """
    part = images[images_of_rank(len(images), context.groups.tp)]
    statistics = vision_family(config.family).statistics
    return normalize(context.device.copy(part), statistics.mean, statistics.std)


def gather_features(part_iph: Tensor, count: int, group: torch.distributed.ProcessGroup) -> Tensor:
    """The features of all images of a micro-batch, from the parts of the ranks.

    What follows must compute the same on every rank, so that every rank has the whole gradient
    of the result.  Backward then needs no communication: a rank takes its part, times the number
    of ranks.  The weights' gradients, each of a part of the images, become the gradient of all
    images when they are averaged over the ranks (``average_gradients_across_tp_domain``, see
    ``build.py``).

    Args:
        part_iph: Features of the images that ``images_of_rank`` names.
        count: Number of images of the micro-batch, the same on every rank.  Without images
            nothing is gathered.

    Returns:
        ``(count, p, h)``.
    """
    size = group.size()
    if size == 1 or not count:
        return part_iph
    if part_iph.requires_grad:
        part_iph.register_hook(lambda grad: grad * size)
    missing = -(-count // size) - len(part_iph)
    padded = torch.nn.functional.pad(part_iph, (0, 0, 0, 0, 0, missing))
    gathered: Tensor = gather_from_sequence_parallel_region(
        padded, tensor_parallel_output_grad=False, group=group
    )
    return gathered[:count]
