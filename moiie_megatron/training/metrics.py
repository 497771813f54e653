"""What is said about a run: a line per step, the same as JSONL, and TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from moiie_megatron.backend.parallel import World
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.moe.layer import MoIIELayer
from moiie_megatron.moe.load_stats import LoadStats
from moiie_megatron.multimodal.model import MoIIEModel
from moiie_megatron.training.step import StepResult


def routing_summary(
    config: RunConfig, world: World, model: MoIIEModel, micro_batches: int
) -> dict[str, Any]:
    """What the routers did since the last call; resets the counters.  Every rank calls this.

    Args:
        micro_batches: Micro-batches of all data-parallel ranks since the last call.

    Returns:
        ``aux``: balance loss by router, the mean over layers and micro-batches (the value that
        alpha weighs); ``layers``: by layer number and router, the share of the router's tokens
        that each expert got (logical order; adds up to top-k).
    """
    layers = config.moe_layers
    if not layers:
        return {"aux": {}, "layers": {}}
    layout = config.moe.layout
    routers, experts = layout.routers, layout.num_experts
    width = LoadStats(len(routers), experts, torch.device("cpu")).packed().numel()
    sums = torch.zeros(len(layers), width, device=world.device.torch_device)
    for number, stats in _local_stats(model):
        sums[layers.index(number)] = stats.packed()
        stats.reset()
    # Ranks hold other tokens (data and sequence parallelism) or other layers (pipeline).
    dist.all_reduce(sums)
    aux = dict.fromkeys(routers, 0.0)
    shares: dict[str, dict[str, list[float]]] = {}
    for number, row in zip(layers, sums.double().cpu(), strict=True):
        stats = LoadStats.unpack(row, len(routers), experts)
        share = stats["load_RE"] / stats["tokens_R"].clamp(min=1).unsqueeze(1)
        shares[str(number)] = {name: share[i].tolist() for i, name in enumerate(routers)}
        for i, name in enumerate(routers):
            aux[name] += float(stats["aux_R"][i]) / (len(layers) * micro_batches)
    return {"aux": aux, "layers": shares}


def _local_stats(model: MoIIEModel) -> Iterator[tuple[int, LoadStats]]:
    for layer in model.language_model.decoder.layers:
        if isinstance(layer.mlp, MoIIELayer):
            yield layer.layer_number - 1, layer.mlp.router.stats


class RunLog:
    """Writes on rank 0: standard output, ``metrics.jsonl`` and ``tensorboard/``.

    A resumed run drops what was logged after its checkpoint, so that the file reads as if the
    run had never stopped.
    """

    def __init__(self, config: RunConfig, world: World, *, start_step: int, total_steps: int):
        self.total_steps = total_steps
        self.start_step = start_step
        self.active = world.rank == 0
        self.start_time = self.last_time = time.monotonic()
        if not self.active:
            return
        output = Path(config.output)
        output.mkdir(parents=True, exist_ok=True)
        self.path = output / "metrics.jsonl"
        kept = [line for line in _complete_lines(self.path) if line["step"] <= start_step]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.file = self.path.open("a", buffering=1)
        self.board = SummaryWriter(str(output / "tensorboard"), purge_step=start_step + 1)

    def step(
        self,
        step: int,
        result: StepResult,
        learning_rates: dict[str, float],
        routing: dict[str, Any],
        faults: int,
    ) -> None:
        """Report one optimizer step (counted from 1)."""
        now = time.monotonic()
        seconds, self.last_time = now - self.last_time, now
        if not self.active:
            return
        values = {
            "step": step,
            "lm_loss": result.lm_loss,
            **{f"aux_{name}": value for name, value in routing["aux"].items()},
            **{f"lr_{part}": lr for part, lr in learning_rates.items()},
            "grad_norm": result.grad_norm,
            "tokens": result.tokens,
            "label_tokens": result.label_tokens,
            "image_share": result.image_tokens / max(result.tokens, 1),
            "tokens_per_second": result.tokens / max(seconds, 1e-9),
            "seconds": seconds,
            "bad_samples": faults,
        }
        self.file.write(json.dumps(values | {"expert_share": routing["layers"]}) + "\n")
        for name, value in values.items():
            if name != "step":
                self.board.add_scalar(name, value, step)
        print(self._line(step, result, values, learning_rates, now), flush=True)

    def _line(
        self,
        step: int,
        result: StepResult,
        values: dict[str, Any],
        learning_rates: dict[str, float],
        now: float,
    ) -> str:
        per_step = (now - self.start_time) / (step - self.start_step)
        left = time.strftime("%H:%M:%S", time.gmtime(per_step * (self.total_steps - step)))
        aux = " ".join(f"{k[4:]} {v:.3f}" for k, v in values.items() if k.startswith("aux_"))
        return (
            f"step {step}/{self.total_steps} | loss {result.lm_loss:.4f} | "
            + (f"aux {aux} | " if aux else "")
            + f"lr {max(learning_rates.values()):.2e} | grad {result.grad_norm:.3f} | "
            f"{values['tokens_per_second']:.0f} tok/s | image {values['image_share']:.0%} | "
            f"left {left}" + ("" if result.updated else " | SKIPPED")
        )

    def saved(self, checkpoint: Path) -> None:
        """Report a checkpoint; the time it took does not count as the next step's."""
        now = time.monotonic()
        seconds, self.last_time = now - self.last_time, now
        if self.active:
            print(f"saved {checkpoint} in {seconds:.1f} s", flush=True)

    def close(self) -> None:
        """Flush and close the files."""
        if self.active:
            self.file.close()
            self.board.close()


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """The records of an earlier run; a line cut off by a kill is dropped."""
    lines = []
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines
