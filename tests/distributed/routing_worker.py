"""Worker of test_routing_log.py: real training runs, and a second count from the routers' outputs.

Arguments: folder for this rank's counts (``RUN/rank0.json``), then configurations.

A hook sees every router in the pass that has gradients: what went in, what came out.  Scores are
computed again from the gates, token by token, and everything is counted in plain Python.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.layout.token_types import IMAGE, PADDING
from moiie_megatron.mcore.dist_env import dist_env_from
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.run import run_sequentially
from moiie_megatron.moe.router import ModalityRouter
from moiie_megatron.training.loop import train


class Count:
    """Calls of the routers of this rank, and what they decided, by step and layer."""

    def __init__(self, config: RunConfig, context: ParallelContext) -> None:
        sizes = config.train
        self.micro_batches = sizes.global_batch_size // (sizes.micro_batch_size * context.dp_size)
        self.placement = config.placement
        self.ep_rank = context.groups.ep.rank()
        self.per_expert = config.moe.dispatcher == "alltoall"
        self.calls: dict[int, int] = defaultdict(int)  # with gradients, by layer
        self.replayed = 0  # without
        self.steps: dict[str, Any] = {}

    def __call__(self, module: Any, inputs: Any, outputs: Any) -> None:
        if not isinstance(module, ModalityRouter):
            return
        if not torch.is_grad_enabled():
            self.replayed += 1
            return
        assert module.layer_number is not None
        layer = module.layer_number - 1
        step = 1 + self.calls[layer] // self.micro_batches
        self.calls[layer] += 1
        experts = module.layout.num_experts
        sums = self.steps.setdefault(str(step), {}).setdefault(
            str(layer),
            {
                kind: {"tokens": 0, "load": [0] * experts, "prob": [0.0] * experts}
                | {"rows": 0, "remote_rows": 0}
                for kind in ("vision", "text", "padding")
            },
        )
        hidden, types = inputs
        _, map_TE = outputs
        self._add(module, hidden.detach().flatten(0, 1), types.flatten().tolist(), map_TE, sums)

    def _add(
        self, module: ModalityRouter, hidden_Th: Tensor, types: list[int], map_TE: Tensor, sums: Any
    ) -> None:
        size = module.layout.num_experts // self.placement.ep_size
        rank_of = {
            expert: place // size for place, expert in enumerate(self.placement.physical_to_logical)
        }
        for hidden_h, kind, row in zip(hidden_Th, types, map_TE.tolist(), strict=True):
            name = {IMAGE: "vision", PADDING: "padding"}.get(kind, "text")
            chosen = [expert for expert, is_chosen in enumerate(row) if is_chosen]
            ranks: Any = [rank_of[expert] for expert in chosen]
            ranks = ranks if self.per_expert else set(ranks)
            found = sums[name]
            found["rows"] += len(ranks)
            found["remote_rows"] += sum(rank != self.ep_rank for rank in ranks)
            router = "joint" if "joint" in module.gates else name
            if name == "padding":
                continue
            found["tokens"] += 1
            for expert in chosen:
                found["load"][expert] += 1
            scores = module.gates[router].detach().double() @ hidden_h.double()
            for expert, prob in zip(
                module.layout.allowed(router), torch.softmax(scores, 0).tolist(), strict=True
            ):
                found["prob"][expert] += prob


def main() -> None:
    out, *files = sys.argv[1:]
    launch = dist_env_from(os.environ)

    def body(config: RunConfig, context: ParallelContext) -> None:
        count = Count(config, context)
        hook = register_module_forward_hook(count)
        train(config, context)
        hook.remove()
        file = Path(out) / Path(config.output).name / f"rank{launch.rank}.json"
        file.write_text(json.dumps({"steps": count.steps, "replayed": count.replayed}))

    run_sequentially([load_config(file) for file in files], launch, body)


if __name__ == "__main__":
    main()
