"""Images split over tensor-parallel ranks train as on one rank, each of which encodes a part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moiie_megatron.mcore.parallel import ParallelContext
from tests.distributed.image_split_worker import MODELS, Results, measure
from tests.helpers.launch import command, run
from tests.te.steps import EXACT, disagreement

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(300)]


def test_split_images_train_as_on_one_rank(tmp_path: Path, context: ParallelContext) -> None:
    run(command("tests/distributed/image_split_worker.py", [tmp_path], 2), timeout=200).check()
    for model in MODELS:
        ranks = [Results(**torch.load(tmp_path / f"{model}-rank{r}.pt")) for r in (0, 1)]
        want = measure(model, context)
        assert ranks[0].record is not None and want.record is not None and want.flops > 0
        # A dense model has no balance losses.
        limits = {k: limit for k, limit in EXACT.items() if k != "aux" or model == "experts"}
        assert disagreement(ranks[0].record, want.record, limits) == {}, model
        for found in ranks:
            assert 2 * found.flops == want.flops
            assert found.courses.keys() == want.courses.keys()
            for name, course in want.courses.items():
                for got, expected in zip(found.courses[name], course, strict=True):
                    assert got == pytest.approx(expected, rel=1e-4), (model, name)
