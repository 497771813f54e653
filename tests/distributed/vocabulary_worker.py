"""One rank of test_vocabulary.py: a vocabulary that two ranks cannot divide, through layouts."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from moiie_megatron.checkpoint.directory import CONFIG_FILE
from moiie_megatron.checkpoint.load_weights import load_weights
from moiie_megatron.checkpoint.save_load import load_checkpoint
from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import ParallelConfig
from moiie_megatron.convert.dcp.reader import CheckpointReader
from moiie_megatron.convert.fill_model import fill_model
from moiie_megatron.convert.reshard import reshard_checkpoint
from moiie_megatron.mcore.parallel import DistEnv, ParallelContext, destroy_parallel, init_parallel
from moiie_megatron.training.state import TrainState, prepare_training
from moiie_megatron.vlm.build import build_chunks
from moiie_megatron.vlm.model import MoIIEModel
from tests.helpers.train_states import save, update

VOCAB = 41


def inputs() -> dict[str, Tensor]:
    """Two rows of text with labels up to the last token of the vocabulary."""
    tokens = torch.arange(2 * 16).reshape(2, 16) % VOCAB
    labels = (tokens * 7 + 33) % VOCAB
    return {
        "tokens": tokens,
        "labels": labels,
        "position_ids": torch.arange(16).repeat(2, 1),
        "token_types": torch.zeros(2, 16, dtype=torch.int8),
    }


def outputs(model: MoIIEModel) -> dict[str, Tensor]:
    """Losses and logits of ``inputs``."""
    batch = inputs()
    with torch.no_grad():
        losses = model(**batch)
        return {"losses": losses, "logits": model(**(batch | {"labels": None}))}


def training(
    source: Path, overrides: list[str], launch: DistEnv
) -> tuple[ParallelContext, TrainState]:
    """Context and fresh training state of a layout."""
    config = load_config(source / CONFIG_FILE, ["train.device=cpu", *overrides])
    context = init_parallel(config.active_parallel, launch, device="cpu", seed=1)
    return context, prepare_training(config, context, build_chunks(config, context), steps=10)


def main() -> None:
    """Arguments: the checkpoint, a directory for the results."""
    source, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    launch = DistEnv(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    tensor = ["parallel.tensor=2"]

    context, state = training(source, tensor, launch)
    (model,) = state.model
    load_weights(source, context, model)
    found = outputs(model)
    # language.pretrained fills a model from whole tensors: the same weights.
    loaded = {name: p.detach().clone() for name, p in model.named_parameters()}
    fill_model(model, CheckpointReader(source).get)
    assert all(torch.equal(p, loaded[name]) for name, p in model.named_parameters())
    model(**inputs()).sum().backward()
    for name in ("embedding.word_embeddings", "output_layer"):
        weight = model.language_model.get_submodule(name).weight
        found[name] = weight.main_grad.clone()
    torch.save(found, out / f"rank{launch.rank}.pt")
    update(state)
    save(out / "tp2", context, state, 1)
    parallel_state.destroy_model_parallel()

    context, state = training(source, [], launch)
    load_checkpoint(out / "tp2", context, state.state_parts())
    save(out / "dp2", context, state, 1)
    parallel_state.destroy_model_parallel()

    if launch.rank == 0:
        shutil.copy(source / CONFIG_FILE, out / "dp2" / CONFIG_FILE)
        shutil.copy(source / CONFIG_FILE, out / "tp2" / CONFIG_FILE)
        reshard_checkpoint(out / "tp2", out / "resharded", ParallelConfig(tensor=2))
    dist.barrier()
    for name in ("dp2", "resharded"):
        context, state = training(source, tensor, launch)
        load_checkpoint(out / name, context, state.state_parts())
        save(out / f"{name}-tp2", context, state, 1)
        parallel_state.destroy_model_parallel()
    destroy_parallel()


if __name__ == "__main__":
    main()
