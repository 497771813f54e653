"""What a run's configuration says about its process groups."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch

from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.run import run_distributed
from tests.parity import tiny


def test_the_timeout_reaches_all_groups() -> None:
    found = []

    def body(context: ParallelContext) -> None:
        groups: list[Any] = [torch.distributed.group.WORLD, *vars(context.groups).values()]
        for group in filter(lambda g: isinstance(g, torch.distributed.ProcessGroup), groups):
            found.append(group._get_backend(torch.device("cpu")).options._timeout)

    config = tiny.run_config(tiny.language("llama"))
    train = config.train.model_copy(update={"timeout_minutes": 23, "device": "cpu"})
    run_distributed(config.model_copy(update={"train": train}), DistEnv(), body)
    assert len(found) > 5 and set(found) == {timedelta(minutes=23)}
