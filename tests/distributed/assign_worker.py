"""One rank of test_assign.py: the golden model's loss in several parallel layouts."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from moiie_megatron.config.schema import MoEConfig, ParallelConfig
from moiie_megatron.convert.load_pretrained import load_pretrained
from moiie_megatron.mcore.parallel import DistEnv, destroy_parallel, init_parallel
from tests.parity import golden, tiny

LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "tp2-etp2": ParallelConfig(tensor=2, expert_tensor=2),
    "pp2": ParallelConfig(pipeline=2),
    "ep2": ParallelConfig(expert=2),
}


def _step(batches: Any, model: Any) -> tuple[Tensor, Any]:
    """The forward step that Megatron's schedule calls; golden embeddings are the input."""
    inputs, case = next(batches)
    tokens, targets = inputs[f"{case}.input_ids"], tiny.shifted(inputs[f"{case}.labels"])
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    losses = model(
        tokens,
        positions,
        tiny.token_types(inputs, case),
        labels=targets,
        inputs_embeds=inputs[f"{case}.inputs_embeds"],
    )

    def mean(losses: Tensor) -> tuple[Tensor, dict[str, float]]:
        loss = losses.sum() / (targets != tiny.IGNORED).sum()
        return loss, {"loss": loss.item()}

    return losses, mean


def _losses(parallel: ParallelConfig, directory: str, launch: DistEnv, moe: MoEConfig) -> list[Any]:
    """The losses of both cases; empty on ranks that are not on the last pipeline stage."""
    context = init_parallel(parallel, launch, device="cpu", seed=1)
    language = tiny.language("llama", pretrained=directory)
    config = tiny.run_config(language, moe, parallel=parallel)
    model = tiny.build(config, context)
    load_pretrained(model, config)
    inputs = golden.tensors("tiny_llama_moiie/inputs")
    result = get_forward_backward_func()(
        forward_step_func=_step,
        data_iterator=iter([(inputs, "ones"), (inputs, "pad")]),
        model=[model],
        num_microbatches=2,
        seq_length=32,
        micro_batch_size=2,
        forward_only=True,
    )
    parallel_state.destroy_model_parallel()
    return [step["loss"] for step in result]


def main() -> None:
    """Arguments: a folder for the results, the directory of the dense parent."""
    folder, dense = sys.argv[1:]
    torch.set_num_threads(1)
    launch = DistEnv(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    moiie = str(golden.ROOT / "tiny_llama_moiie")
    results = {}
    for name, parallel in LAYOUTS.items():
        results[name] = _losses(parallel, moiie, launch, MoEConfig())
        upcycled = MoEConfig(router_init_std=0.3)
        results[f"{name}-upcycled"] = _losses(parallel, dense, launch, upcycled)
    with open(f"{folder}/rank{launch.rank}.json", "w") as file:
        json.dump(results, file)
    destroy_parallel()


if __name__ == "__main__":
    main()
