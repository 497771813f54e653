"""One rank of test_image_split.py: training steps on micro-batches of 0 to 5 images.

Argument: the directory for the results (``experts-rank0.pt``, ...).
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moiie_megatron.config.schema import ParallelConfig, RunConfig
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.evaluation.layout_equivalence import record_step
from moiie_megatron.mcore.dist_env import connect_store, dist_env_from
from moiie_megatron.mcore.parallel import ParallelContext, destroy_parallel, init_parallel
from moiie_megatron.training.step import forward_inputs
from moiie_megatron.vlm.build import build_model
from tests.te.steps import RATES, Weights, course, padded, tiny_config, with_section

MODELS = ("experts", "dense")
# Samples of the micro-batches, which hold 0, 1, 5, 4, 3 and 2 images.
SAMPLES = (
    ("text", "short"),
    ("image", "text"),
    ("two images", "two turns", "image"),
    ("two images", "two turns"),
    ("image", "two images"),
    ("text", "two images"),
)
FOUR_IMAGES = 3


@dataclass(frozen=True)
class Results:
    """What a rank has measured.

    Attributes:
        record: Losses and gradients (``record_step``), on rank 0.
        courses: Loss and gradient norm of a step, by what trains.
        flops: Of the vision encoder in a micro-batch of four images, forward and backward.
    """

    record: dict[str, Tensor] | None
    courses: dict[str, list[tuple[float, float]]]
    flops: int


def variants(config: RunConfig) -> dict[str, RunConfig]:
    """What trains, and whether the vision encoder's layers are replayed."""
    rates = config.stage.learning_rates
    kept = {
        "all": rates,
        "connector": {"connector": 1e-3},
        "vision frozen": {part: rate for part, rate in rates.items() if part != "vision"},
    }
    stages = {name: with_section(config, "stage", learning_rates=r) for name, r in kept.items()}
    return {**stages, "recompute": with_section(config, "vision", recompute=True)}


def parallelism(model: str, tensor: int) -> ParallelConfig:
    """With sequence parallelism for experts, which need it, without for a dense model."""
    return ParallelConfig(tensor=tensor, sequence=tensor > 1 and model == "experts")


def measure(model: str, context: ParallelContext) -> Results:
    """Steps of all micro-batches, each from the same weights."""
    config = tiny_config(parallel=parallelism(model, context.groups.tp.size()))
    if model == "dense":
        rates = {part: rate for part, rate in RATES.items() if part != "moe"}
        config = with_section(config, "moe", variant="dense")
        config = with_section(config, "stage", moe=False, learning_rates=rates)
    batches = [padded(names, multiple_of=2) for names in SAMPLES]
    assert [len(batch.images) for batch in batches] == [0, 1, 5, 4, 3, 2]
    return Results(
        record_step(config, context, batches, Weights(config, context)),
        {name: course(c, context, [batches]) for name, c in variants(config).items()},
        vision_flops(config, context, batches[FOUR_IMAGES]),
    )


def vision_flops(config: RunConfig, context: ParallelContext, batch: Batch) -> int:
    model = build_model(config, context)
    with FlopCounterMode(display=False) as counter:
        model(**forward_inputs(config, batch, context, model)).sum().backward()
    return sum(counter.get_flop_counts()["MoIIEModel.vision_encoder"].values())


def main() -> None:
    torch.set_num_threads(1)
    dist_env = dist_env_from(os.environ)
    store = connect_store(dist_env)
    for model in MODELS:
        context = init_parallel(
            parallelism(model, 2), dist_env, device="cpu", store=dist.PrefixStore(model, store)
        )
        results = measure(model, context)
        torch.save(asdict(results), Path(sys.argv[1]) / f"{model}-rank{dist_env.rank}.pt")
        destroy_parallel()


if __name__ == "__main__":
    main()
