"""Where a packed micro-batch makes the host wait for the device, forward and backward.

A place that is not in the list fails the test: avoid it, or add it with its reason.
"""

from __future__ import annotations

import pytest
import torch

from moiie_megatron.config.schema import MoEConfig
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.layout.token_types import IMAGE
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.step import forward_inputs
from tests.helpers.host_syncs import HostSyncs
from tests.parity.tiny import build, language, run_config

IMAGE_TOKENS = 16
MOE = MoEConfig(num_vision_experts=1, num_shared_experts=2, num_text_experts=1)
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

# On a GPU, the host waits here.
WAITS = {
    "moe/row_counts.py: self._copied.synchronize(): synchronize": (
        "the all-to-all needs its sizes on the host; once per MoE layer"
    ),
}
# These tensors are on the host also where the model is on a GPU, or the CPU alone runs the line.
ON_THE_HOST = {
    "data/stream/batch.py: rows, columns = (token_types == IMAGE).nonzero(as_tuple=True): nonzero",
    "data/stream/batch.py: return (self.labels.t().reshape(-1) != IGNORE).nonzero().squeeze(1): "
    "nonzero",
    "mcore/packed_sequences.py: lengths = tuple(cu_seqlens.diff().tolist()): tolist",
    # The counts that have been copied.
    "moe/dispatcher.py: lambda: int(state.counts.splits.tokens_per_expert.sum()),: "
    "_local_scalar_dense",
    "moe/row_counts.py: etp_splits=rows[:, :, ep_rank].sum(dim=0).tolist(),: tolist",
    "moe/row_counts.py: input_splits=rows[ep_rank, groups.expt_tp.rank()].tolist(),: tolist",
    "moe/row_counts.py: output_splits=rows[:, groups.expt_tp.rank(), ep_rank].tolist(),: tolist",
    # Experts one after the other.
    "moe/expert_ffn.py: counts = rows_per_expert.tolist(): tolist",
    # Megatron's unfused rotary embedding reads cu_seqlens, which stay on the CPU for it.
    "mcore/inference/attention.py: output: tuple[Tensor, Tensor | None] = super().forward(: "
    "_local_scalar_dense",
    "mcore/inference/attention.py: output: tuple[Tensor, Tensor | None] = super().forward(: tolist",
}


def packed_row() -> Batch:
    """A sample with an image and one of text alone."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(5, 150, (1, 40), generator=generator)
    types = torch.zeros(1, 40, dtype=torch.int8)
    types[0, 1 : 1 + IMAGE_TOKENS] = IMAGE
    labels = tokens.roll(-1, dims=1).masked_fill(types != 0, -100)
    positions = torch.cat([torch.arange(30), torch.arange(10)]).unsqueeze(0)
    images = torch.randint(0, 256, (1, 3, 28, 28), generator=generator, dtype=torch.uint8)
    boundaries = torch.tensor([0, 30, 40], dtype=torch.int32)
    return Batch(tokens, labels, positions, types, images, IMAGE_TOKENS, ("a", "b"), (), boundaries)


@pytest.mark.parametrize(("megatron", "passes"), [({}, 1), (FULL, 2)], ids=["off", "full"])
def test_the_host_waits_where_it_must(
    megatron: dict[str, object], passes: int, context: ParallelContext
) -> None:
    config = run_config(language("llama"), MOE).model_copy(update={"megatron": megatron})
    model = build(config, context)
    row = packed_row()
    with HostSyncs().recorded() as found:
        loss = model(**forward_inputs(config, row, context, model)).sum()
        loss.backward()
    unknown = found.counts.keys() - WAITS.keys() - ON_THE_HOST
    assert not unknown, sorted(unknown)
    counts = [found.counts[place] for place in WAITS]
    assert counts == [2 * passes]  # two MoE layers
    assert found.counts.keys() >= ON_THE_HOST


def test_what_waits_is_recorded(context: ParallelContext) -> None:
    with HostSyncs().recorded() as found:
        numbers = torch.arange(3.0)
        numbers.sum().item()
        numbers.nonzero()
        numbers[numbers > 1]
        numbers.cpu().tolist()
        numbers.to("cpu")
        numbers.to("cpu", non_blocking=True)
        numbers.to(torch.device("cpu"))
        torch.cuda.Event().synchronize()
    names = sorted(place.rpartition(" ")[2] for place in found.counts.elements())
    assert names == [
        "_local_scalar_dense",
        "cpu",
        "index",
        "nonzero",
        "synchronize",
        "to",
        "tolist",
    ]
    before = dict(found.counts)
    numbers.tolist()
    assert found.counts == before
