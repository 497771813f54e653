"""What a run's configuration says about its process groups."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import pytest
import torch

from moiie_megatron.mcore import run
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


@pytest.mark.parametrize(
    ("precision", "has_instructions", "count"),
    [("bf16", False, 1), ("bf16", True, 0), ("bf16", None, 0), ("fp32", False, 0)],
)
def test_bf16_on_a_cpu_without_instructions_for_it(
    precision: str,
    has_instructions: bool | None,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(run, "has_bf16_instructions", lambda: has_instructions)
    monkeypatch.setattr(logging.getLogger("moiie_megatron"), "propagate", True)
    config = tiny.run_config(tiny.language("llama"))
    train = config.train.model_copy(update={"precision": precision, "device": "cpu"})
    run_distributed(config.model_copy(update={"train": train}), DistEnv(), lambda context: None)
    found = [record for record in caplog.records if "no BF16 instructions" in record.getMessage()]
    assert len(found) == count
