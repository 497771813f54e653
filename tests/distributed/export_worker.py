"""One rank of test_export.py: a checkpoint, loaded and saved again in several layouts."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
from megatron.core import parallel_state

from moiie_megatron.checkpoint.directory import CONFIG_FILE, FORMAT_VERSION, copy_tokenizer
from moiie_megatron.checkpoint.load_weights import load_weights
from moiie_megatron.checkpoint.save_load import sharding_metadata
from moiie_megatron.config.load import load_config
from moiie_megatron.mcore.parallel import DistEnv, destroy_parallel, init_parallel
from moiie_megatron.mcore.patches.dist_checkpointing import plan_save
from moiie_megatron.vlm.build import build_model

LAYOUTS = {
    "tp2ep2": ["parallel.tensor=2", "parallel.expert=2"],
    "tp2etp2": ["parallel.tensor=2", "parallel.expert_tensor=2"],
    "pp2": ["parallel.pipeline=2"],
    "ep2": ["parallel.expert=2"],
}


def main() -> None:
    """Arguments: the checkpoint, a folder for one checkpoint per layout."""
    source, target = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    launch = DistEnv(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    for name, overrides in LAYOUTS.items():
        config = load_config(source / CONFIG_FILE, ["train.device=cpu", *overrides])
        context = init_parallel(config.active_parallel, launch, device="cpu", seed=1)
        model = build_model(config, context)
        load_weights(source, context, model)
        folder = target / name
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "model": model.sharded_state_dict(metadata=sharding_metadata(context)),
            "format_version": FORMAT_VERSION,
            "progress": {"step": 1},
        }
        plan_save(state, folder, {}).execute_sync()
        if launch.rank == 0:
            shutil.copy(source / CONFIG_FILE, folder / CONFIG_FILE)
            copy_tokenizer(source, folder)
        parallel_state.destroy_model_parallel()
    destroy_parallel()


if __name__ == "__main__":
    main()
