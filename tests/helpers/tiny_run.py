"""Tiny runs: their data, their configuration, and what they log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from moiie_megatron.data.digits.dataset import write_digits

SEQUENCE_LENGTH = 160
# Rates and balance weights that are large on purpose: errors show within a few steps.
LEARNING_RATES = {"vision": 1e-3, "connector": 1e-3, "language": 1e-3, "moe": 1e-3}
AUX_COEFF = 0.05


def make_digits(folder: Path) -> None:
    """Scanned digits with questions: 60 pictures, some conversations without any."""
    write_digits(folder / "data", train=60, test=8)


def tiny_values(digits: Path, output: Path, stage: str = "joint") -> dict[str, Any]:
    """A run of the tiny models in fp32 on the CPU, as the content of its YAML file."""
    dense = stage in ("connector", "dense")
    rates = {part: rate for part, rate in LEARNING_RATES.items() if part != "moe" or not dense}
    if stage == "connector":
        rates = {"connector": 1e-3}
    return {
        "output": str(output),
        "language": {"preset": "tiny-llama"},
        "vision": {"preset": "tiny-siglip"},
        "moe": {"vision_aux_loss_coeff": AUX_COEFF, "text_aux_loss_coeff": AUX_COEFF},
        "stage": {"preset": f"stage-{stage}", "template": "phi3", "learning_rates": rates},
        "data": {
            "sources": [
                {
                    "records": str(digits / "data" / "train.jsonl"),
                    "images": str(digits / "data" / "images"),
                }
            ],
            "tokenizer": str(digits / "data" / "tokenizer.model"),
            "sequence_length": SEQUENCE_LENGTH,
            "num_workers": 0,
        },
        "train": {
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "steps": 5,
            "precision": "fp32",
            "device": "cpu",
        },
        "checkpoint": {"interval": 100},
        "log": {"routing_interval": 1},
    }


def write_config(path: Path, values: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """The steps that a run has logged; a line that is being written is left out."""
    return _lines(output / "metrics.jsonl")


def read_routing(output: Path) -> list[dict[str, Any]]:
    """The routing records that a run has logged, by step."""
    return _lines(output / "routing.jsonl")


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    text = path.read_text()
    lines = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
    return [json.loads(line) for line in lines]
