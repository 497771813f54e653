"""The run whose loss curve is committed (``tests/data/loss_curve.json``).

``python -m tests.helpers.loss_curve`` trains it and writes the file: only after a change that is
meant to change what training computes.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from moiie_megatron.config.load import load_config
from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.run import run_distributed
from moiie_megatron.training.loop import train
from tests.helpers.tiny_run import make_digits, read_metrics, tiny_values, write_config

FILE = Path(__file__).resolve().parents[1] / "data" / "loss_curve.json"
STEPS = 30


def curve_values(digits: Path, output: Path) -> dict[str, Any]:
    """Stage 2 of a tiny MoIIE model in fp32: all parts train, with balance and z-losses, weight
    decay, gradient clipping, warm-up and cosine decay."""
    values = tiny_values(digits, output)
    values["moe"] |= {"layers": "all", "z_loss_coeff": 0.01}
    values["language"] |= {"num_layers": 2}
    values["stage"]["learning_rates"] = {
        "vision": 1e-4,
        "connector": 1e-3,
        "language": 5e-4,
        "moe": 2e-3,
    }
    values["optimizer"] = {"weight_decay": 0.1, "warmup_ratio": 0.1, "min_lr_ratio": 0.05}
    values["train"] |= {"steps": STEPS, "global_batch_size": 4}
    values["checkpoint"] = {"interval": STEPS}
    values["log"] = {"routing_interval": STEPS}
    return values


def curve(metrics: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The logged values of every step by name, without those that tell the time."""
    times = ("seconds", "tokens_per_second", "tflops_per_rank", "data_wait_fraction")
    return {name: [line[name] for line in metrics] for name in metrics[0] if name not in times}


def train_curve(folder: Path, context: ParallelContext) -> dict[str, list[float]]:
    """Train the run below ``folder`` and read its curve."""
    make_digits(folder)
    config = load_config(write_config(folder / "run.yaml", curve_values(folder, folder / "run")))
    train(config, context)
    return curve(read_metrics(folder / "run"))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = load_config(write_config(folder / "c.yaml", curve_values(folder, folder / "c")))
        found: list[dict[str, list[float]]] = []
        run_distributed(
            config, DistEnv(), lambda context: found.append(train_curve(folder, context))
        )
    lines = [f" {json.dumps(name)}: {json.dumps(values)}" for name, values in found[0].items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
