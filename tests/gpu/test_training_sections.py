"""Fields of ``ddp`` and ``optimizer.megatron`` that a GPU alone has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moiie_megatron.config.megatron_section.table import MegatronSection
from moiie_megatron.config.schema import ParallelConfig
from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.mcore.parallel import ParallelContext, destroy_parallel, init_parallel
from tests.helpers.megatron_cases import Case
from tests.helpers.training_cases import GPU_CASES, take_steps, with_fields

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture
def gpu() -> Iterator[ParallelContext]:
    yield init_parallel(ParallelConfig(), DistEnv(), device="cuda", seed=1)
    destroy_parallel()


@pytest.mark.parametrize(("section", "case"), GPU_CASES, ids=str)
def test_weights_are_updated_as_without(
    gpu: ParallelContext, section: MegatronSection, case: Case
) -> None:
    """Two updates at a rate of 1e-3 change a weight by 2e-3; kernels do not repeat to the bit."""
    found, plain = (take_steps(with_fields(section, fields), gpu) for fields in (case, {}))
    for name, want in plain.items():
        assert found[name].isfinite().all(), name
        if name.startswith("weight/"):
            assert (found[name] - want).abs().max() < 5e-3, name
    torch.testing.assert_close(found["losses"], plain["losses"], rtol=1e-2, atol=0)
