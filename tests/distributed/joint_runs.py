"""Runs with experts that start from one dense checkpoint: what their fixtures and tests share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from moiie_megatron.config.load import load_saved_config
from moiie_megatron.convert.upcycle import upcycle_checkpoint
from tests.helpers.launch import TRAIN, command, run
from tests.helpers.tiny_hf import write_language, write_vision
from tests.helpers.tiny_run import tiny_values, write_config

STEPS = 6
SAVE_EVERY = 2

# A sequence with an image has more than 32 tokens, half of one has not.  Attention is sharp and
# the frequencies far apart, so that the tiny model feels the difference.
LONGROPE = {
    "short_factor": [1.0] * 8,
    "long_factor": [0.02] * 8,
    "factor": 1e9,
    "original_max_position_embeddings": 32,
}

# The first of the two layers of each stage is recomputed, the other one, with experts, is not.
BLOCK = {
    "recompute_granularity": "full",
    "recompute_method": "block",
    "recompute_num_layers": 1,
}

# Reductions and gathers during the passes, as on GPUs; a tiny model is one bucket.
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}

# Of four layers, one and three on two pipeline stages.
FIRST_SMALL, LAST_SMALL = [1, 3], [3, 1]

# Of four layers on two pipeline ranks, the layers of one rank have no experts: of the second rank,
# or with virtual stages, layers 0 and 2 on the first rank, of that one.
ONE_LAYER = {"layers": [1]}
VIRTUAL = {"pipeline": 2, "virtual_pipeline": 2}


def joint_values(digits: Path, output: Path, seed: Path, **sections: Mapping[str, Any]) -> Any:
    """A MoE run that starts from the dense checkpoint; ``sections`` are laid over its own."""
    values = tiny_values(digits, output)
    values["train"]["steps"] = STEPS
    values["checkpoint"]["init_from"] = str(seed)
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    return values


def held_out(digits: Path, interval: int = 3) -> dict[str, Any]:
    """The ``data`` section of a run that validates.

    Ten samples with none, one and several images: a round of eight, and one of mostly padding.
    """
    pictures = str(digits / "data" / "images")
    sources = [
        {"records": str(digits / "data" / f"{name}.jsonl"), "images": pictures}
        for name in ("train", "test")
    ]
    validation = {"sources": sources, "interval": interval, "samples": 5, "at_start": True}
    return {"validation": validation}


def read_validations(output: Path) -> list[dict[str, Any]]:
    """The lines of ``validation.jsonl``, without their time."""
    text = (output / "validation.jsonl").read_text()
    return [json.loads(line) | {"seconds": 0.0} for line in text.splitlines()]


# Families whose attention has what others lack, and how their tiny models show it.
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"head_dim": 16, "sliding_window": 20},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}


def make_family(folder: Path, family: str) -> None:
    """An upcycled checkpoint of a family's tiny model, as ``folder/FAMILY-checkpoint``."""
    values = {"vocab_size": 512, "max_position_embeddings": 512, **FAMILIES[family]}
    llm = folder / f"{family}-llm"
    write_language(llm, family, torch.float32, random_vectors=True, **values)
    vision = write_vision(folder / f"{family}-vision", dtype=torch.float32)
    upcycle_checkpoint(llm, vision, folder / f"{family}-checkpoint")


def family_values(digits: Path, output: Path, checkpoint: Path, **sections: Any) -> Any:
    """Five steps from a family's checkpoint."""
    config = load_saved_config(checkpoint / "run.yaml")
    values = joint_values(digits, output, checkpoint, train={"steps": 5}, **sections)
    return values | {
        "language": config.language.model_dump(),
        "vision": config.vision.model_dump(),
    }


def train_in_turn(folder: Path, runs: Mapping[str, Any], processes: int, timeout: float) -> None:
    """One launch of ``tools/train.py`` for all runs; each gets ``folder/NAME``."""
    files = [write_config(folder / f"{name}.yaml", values) for name, values in runs.items()]
    run(command(TRAIN, files, processes), timeout).check()


def go_back(output: Path, copy: Path, step: int) -> Path:
    """A copy of a finished run, as it was after its checkpoint of ``step``."""
    shutil.copytree(output, copy)
    checkpoints = copy / "checkpoints"
    (checkpoints / "latest").write_text(f"step_{step:07d}\n")
    for folder in checkpoints.glob("step_*"):
        if folder.name > f"step_{step:07d}":
            shutil.rmtree(folder)
    return copy


# Layouts add the same fp32 numbers in another order: each sum differs by some 1e-7 of its size,
# and Adam divides small gradients by their own size, which makes such differences grow from step
# to step.  Measured: below 1e-5 in six steps.  A wrong factor on any gradient is 1e-2 and more.
TOLERANCE = 1e-4


def assert_same_validations(output: Path, reference: Path, tolerance: float = TOLERANCE) -> None:
    """Two runs have validated after the same steps, on the same samples, with the same losses.

    Before the first step weights are equal, and losses up to rounding.
    """
    found, wanted = read_validations(output), read_validations(reference)
    assert len(found) > 1
    for line, want in zip(found, wanted, strict=True):
        assert_same_losses(line, want, 1e-6 if line["step"] == 0 else tolerance)


def assert_same_losses(line: dict[str, Any], wanted: dict[str, Any], tolerance: float) -> None:
    """Two validations on the same samples."""
    assert _counts(line) == _counts(wanted)
    assert _losses(line) == pytest.approx(_losses(wanted), rel=tolerance), line["step"]


def _losses(line: Any) -> list[float]:
    """The losses of a line, of its sources and of their groups, in order."""
    parts = line.values() if isinstance(line, dict) else []
    own = [line["loss"]] if "loss" in line else []
    return own + [loss for part in parts if isinstance(part, dict) for loss in _losses(part)]


def _counts(line: Any) -> Any:
    """A line without its losses."""
    if not isinstance(line, dict):
        return line
    return {key: _counts(value) for key, value in line.items() if key != "loss"}


def assert_same_course(
    steps: list[dict[str, Any]], reference: list[dict[str, Any]], tolerance: float = TOLERANCE
) -> None:
    """Two runs logged the same values at the same steps."""
    assert [line["step"] for line in steps] == [line["step"] for line in reference]
    for line, wanted in zip(steps, reference, strict=True):
        for key in ("tokens", "label_tokens", "image_fraction"):
            assert line[key] == wanted[key], (line["step"], key)
        for key in ("lm_loss", "aux_vision", "aux_text", "grad_norm"):
            near = pytest.approx(wanted[key], rel=tolerance, abs=tolerance)
            assert line[key] == near, (line["step"], key)
