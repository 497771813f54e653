"""One order on all ranks for the collectives of weights and gradients that overlap with passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Final

from moiie_megatron.mcore.patches.patch import Patch

_GROUP: Final = "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup"


def keep_bucket_order(ddp: Any) -> None:
    """Begin reductions and gathers of a built ``DistributedDataParallel`` in bucket order.

    Buckets are numbered from the end of the model.  Reductions begin with the first one and
    gathers with the last one; a bucket whose turn has not come waits for those before it.
    """
    for groups in (ddp.bucket_groups, ddp.expert_parallel_bucket_groups):
        if ddp.ddp_config.overlap_grad_reduce:
            _InTurn(groups)
        if ddp.use_forward_hook:
            for earlier, later in pairwise(reversed(groups)):
                later.start_param_sync = partial(_gather_after, earlier, later.start_param_sync)


class _InTurn:
    """Reductions of a step: every bucket's begins once, after that of the bucket before it."""

    def __init__(self, groups: Sequence[Any]) -> None:
        self._starts: list[Callable[[], None]] = []
        self._ready: dict[int, dict[str, Any]] = {}
        self._next = 0
        for index, group in enumerate(groups):
            self._starts.append(group.start_grad_sync)
            group.start_grad_sync = partial(self._start, index)

    def _start(self, index: int, **options: Any) -> None:
        self._ready[index] = options
        while self._next in self._ready:
            self._starts[self._next](**self._ready.pop(self._next))
            self._next = (self._next + 1) % len(self._starts)


def _gather_after(earlier: Any, start: Callable[..., None], force_sync: bool = False) -> None:
    if not force_sync and not earlier.param_gather_dispatched:
        earlier.start_param_sync()
    start(force_sync=force_sync)


PATCHES: Final = (
    Patch(
        name="bucket order",
        targets=(f"{_GROUP}.start_grad_sync", f"{_GROUP}.start_param_sync"),
        reason="A bucket's reduction begins when the gradients of its weights are there, and its "
        "gather when a module needs them.  Ranks with and without images may come to that in "
        "different orders, and the collectives of different buckets would be taken for one.",
    ),
)
