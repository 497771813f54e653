"""Worker of test_generation.py: answers of tiny models in several layouts.

Arguments: folder for the results of rank 0 (``CASE.json``), and how many processes there are.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.generation.sampling import Sampling
from moiie_megatron.generation.token_generator import TokenGenerator
from moiie_megatron.mcore.dist_env import dist_env_from
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.run import run_sequentially
from tests.helpers import generation
from tests.helpers.generation import NEW_TOKENS

DRAWN = Sampling(temperature=1.2, top_k=40, top_p=0.95, seed=11)
# By number of processes: the model, and how it is split.
CASES: dict[int, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    2: {
        "tp2": ({"variant": "dense"}, {"tensor": 2, "sequence": False}),
        "tp2sp": ({}, {"tensor": 2}),
        "ep2": ({}, {"expert": 2}),
        "ep2allgather": ({"variant": "vanilla", "moe": {"dispatcher": "allgather"}}, {"expert": 2}),
        "pp2longrope": ({"language": "longrope"}, {"pipeline": 2, "pipeline_layers": [1, 3]}),
        "dp2": ({"variant": "modality"}, {}),
    },
    4: {
        "pp2ep2": ({}, {"pipeline": 2, "expert": 2}),
        "tp2pp2": (
            {"language": "qwen3"},
            {"tensor": 2, "expert_tensor": 2, "pipeline": 2},
        ),
    },
}


def config_of(processes: int, name: str) -> RunConfig:
    model, parallel = CASES[processes][name]
    config = generation.run_config(**model, parallel=parallel)
    return config.model_copy(update={"output": name})


def answers(folder: Path, config: RunConfig, context: ParallelContext) -> None:
    """What is generated: greedily, drawn, one prompt alone, with stop ids; scores of a pass."""
    model = generation.model(config, context)
    prompts = generation.prompts(config)
    generator = TokenGenerator(config, context, model, config.language.vocab_size)
    tokens: list[int] = []
    model.language_model.decoder.layers[0].register_forward_pre_hook(
        lambda _, __, kwargs: tokens.append(kwargs["hidden_states"].shape[0]), with_kwargs=True
    )
    greedy = generator.generate(prompts, NEW_TOKENS)
    counts = list(tokens)
    stops = {greedy[0][2], greedy[1][3]}
    result = {
        "greedy": greedy,
        "drawn": generator.generate(prompts, NEW_TOKENS, sampling=DRAWN),
        "first alone": generator.generate(prompts[:1], 2),
        "stopped": generator.generate(prompts, NEW_TOKENS, stop_ids=stops),
        "logits": generator.next_token_logits(prompts, greedy).tolist(),
        "counts": counts,
    }
    gathered: list[Any] = [None] * context.size
    torch.distributed.all_gather_object(gathered, result)
    if context.rank == 0:
        (folder / f"{config.output}.json").write_text(json.dumps(gathered))


def main() -> None:
    folder, processes = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    configs = [config_of(processes, name) for name in CASES[processes]]

    def body(config: RunConfig, context: ParallelContext) -> None:
        answers(folder, config, context)

    run_sequentially(configs, dist_env_from(os.environ), body)


if __name__ == "__main__":
    main()
