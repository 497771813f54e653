"""One process without Transformer Engine: a run of its own, and the end of another one's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE

from moiie_megatron.checkpoint.save_load import load_checkpoint
from moiie_megatron.config.schema import ParallelConfig
from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.mcore.parallel import destroy_parallel, init_parallel
from moiie_megatron.training.step import StepResult
from tests.te.runs import save, start, step


def logged(result: StepResult) -> dict[str, float]:
    return {"lm_loss": result.lm_loss, "grad_norm": result.grad_norm}


def main() -> None:
    """Arguments: a directory for ``step`` and ``losses.json``, a checkpoint to go on from."""
    out, checkpoint = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    assert not HAVE_APEX_OR_TE
    context = init_parallel(ParallelConfig(), DistEnv(), device="cpu", seed=1)
    state = start("moe", context, 1)
    step("moe", context, state)
    step("moe", context, state)
    save(out / "step", "moe", context, state)
    third = logged(step("moe", context, state))
    state = start("moe", context, 2)
    load_checkpoint(checkpoint, context, state.state_parts())
    resumed = logged(step("moe", context, state))
    (out / "losses.json").write_text(json.dumps({"third": third, "resumed": resumed}))
    destroy_parallel()


if __name__ == "__main__":
    main()
