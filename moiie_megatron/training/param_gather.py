"""Gathers of updated weights that overlap with the forward pass (``ddp.overlap_param_gather``).

Megatron's distributed optimizer updates the part of the weights that a rank owns.  With the
overlap, hooks of all modules gather the rest bucket by bucket: a module waits for the buckets of
its own weights, and the next bucket is gathered meanwhile.  Left to its users are weights that
are read without a forward pass of their module, or between two steps.
"""

from __future__ import annotations

from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import nn


def complete_hooks(ddp: DistributedDataParallel) -> None:
    """Let modules wait for weights that Megatron's hooks do not see.

    Those wait for the weights of a module that is called.  A container of weights is not, so its
    parent waits for them.
    """
    if not ddp.use_forward_hook:
        return
    for module in ddp.module.modules():
        for child in module.children():
            if isinstance(child, nn.ParameterDict | nn.ParameterList):
                module.register_forward_pre_hook(_waiting_hook(ddp, list(child.parameters())))


def _waiting_hook(ddp: DistributedDataParallel, parameters: list[nn.Parameter]) -> Any:
    known = ddp.param_to_bucket_group
    groups = list(dict.fromkeys(known[parameter] for parameter in parameters if parameter in known))

    def hook(_module: nn.Module, _inputs: Any) -> None:
        for group in groups:
            group.finish_param_sync()

    return hook


def gather_all(ddp: DistributedDataParallel) -> None:
    """Gather all weights and wait; afterwards every rank may read them until the next step.

    All ranks must call this.
    """
    if ddp.use_forward_hook:
        ddp.start_param_sync(force_sync=True)
