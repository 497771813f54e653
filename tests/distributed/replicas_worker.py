"""Worker of test_replicas.py: steps in which one rank's gradients of the vision are inexact.

Arguments: configuration, folder for the results (``rank0.json``, ...), and overrides.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.dist_env import dist_env_from
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.run import run_sequentially
from moiie_megatron.training.stages import named_parts
from moiie_megatron.training.state import prepare_training
from moiie_megatron.training.step import train_step
from moiie_megatron.vlm.build import build_chunks
from tests.helpers.batches import image_batch

NOISE = 1e-6
STEPS = 3


def steps(config: RunConfig, context: ParallelContext) -> dict[str, object]:
    """Train with noise on rank 1; how far replicas of weights are then apart."""
    model = build_chunks(config, context)
    replicas = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not getattr(parameter, "tensor_model_parallel", False)
    }
    vision = {
        n: p
        for chunk in model
        for part, n, p in named_parts(chunk)
        if part in ("vision", "connector")
    }
    start = {name: parameter.detach().clone() for name, parameter in vision.items()}
    train_state = prepare_training(config, context, model, STEPS)
    train_state.model.train()
    trained = {name: p for name, p in vision.items() if p.requires_grad}
    noisy = 0

    def add_noise(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal noisy
        noisy += 1
        return gradient + NOISE * torch.randn_like(gradient)

    if context.groups.tp.rank() == 1:
        for parameter in trained.values():
            parameter.register_hook(add_noise)
    norms = [
        train_step(config, context, train_state, [image_batch(seed)]).grad_norm
        for seed in range(STEPS)
    ]
    apart = {}
    for name, parameter in replicas.items():
        of_rank_0 = parameter.detach().clone()
        dist.broadcast(of_rank_0, 0, group=context.groups.tp)
        apart[name] = float((parameter.detach() - of_rank_0).abs().max())
    return {
        "apart": apart,
        "noisy gradients": noisy,
        "trained": len(trained),
        "moved": [name for name, p in trained.items() if not torch.equal(p, start[name])],
        "grad_norms": norms,
    }


def main() -> None:
    file, out, *overrides = sys.argv[1:]
    dist_env = dist_env_from(os.environ)
    everything = load_config(file, overrides)
    alone = load_config(file, [*overrides, "stage.learning_rates.vision=null"])
    dropout = load_config(
        file, [*overrides, "megatron={hidden_dropout: 0.1, attention_dropout: 0.1}"]
    )
    results: list[dict[str, object]] = []
    run_sequentially(
        [everything, alone, dropout],
        dist_env,
        lambda config, context: results.append(steps(config, context)),
    )
    (Path(out) / f"rank{dist_env.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
