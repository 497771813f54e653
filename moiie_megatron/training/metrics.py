"""What is said about a run: a line per step, the same as JSONL, and TensorBoard."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from moiie_megatron.backend.parallel import World
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.training.routing import RoutingSummary
from moiie_megatron.training.step import StepResult


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
        kept = [line for line in complete_lines(self.path) if line["step"] <= start_step]
        beside = self.path.with_name("metrics.jsonl.writing")
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(beside, self.path)
        self.file = self.path.open("a", buffering=1)
        self.board = SummaryWriter(str(output / "tensorboard"), purge_step=start_step + 1)

    def step(
        self,
        step: int,
        result: StepResult,
        learning_rates: dict[str, float],
        routing: RoutingSummary,
        faults: int,
        skipped: int,
        spike: float | None,
    ) -> None:
        """Report one optimizer step (counted from 1).

        Args:
            skipped: Steps up to now whose loss or gradient was not finite.
            spike: The loss as a multiple of what is usual, if it is a spike.
        """
        now = time.monotonic()
        seconds, self.last_time = now - self.last_time, now
        if not self.active:
            return
        values = {
            "step": step,
            "lm_loss": result.lm_loss,
            **{f"aux_{name}": value for name, value in routing.aux.items()},
            **{f"z_{name}": value for name, value in routing.z.items()},
            **{f"lr_{part}": lr for part, lr in learning_rates.items()},
            "grad_norm": result.grad_norm,
            "tokens": result.tokens,
            "label_tokens": result.label_tokens,
            "image_share": result.image_tokens / max(result.tokens, 1),
            "padding_share": 1 - result.tokens / result.positions,
            # Padding does not count.
            "tokens_per_second": result.tokens / max(seconds, 1e-9),
            "seconds": seconds,
            "bad_samples": faults,
            "skipped_steps": skipped,
            **({} if spike is None else {"spike": spike}),
        }
        self.file.write(
            json.dumps(
                values
                | {
                    "expert_share": routing.expert_share,
                    "rows_per_token": routing.rows_per_token,
                    "remote_rows_per_token": routing.remote_rows_per_token,
                }
            )
            + "\n"
        )
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
            f"left {left}"
            + ("" if result.updated else " | SKIPPED: loss or gradient is not finite")
            + (f" | SPIKE: {values['spike']:.1f} x the usual loss" if "spike" in values else "")
        )

    def saved(self, checkpoint: Path, seconds: float) -> None:
        """Report a checkpoint that is complete; the time it took since its save began.

        The time since the last step does not count as the next step's.
        """
        self.last_time = time.monotonic()
        if self.active:
            print(f"saved {checkpoint} in {seconds:.1f} s", flush=True)

    def close(self) -> None:
        """Flush and close the files."""
        if self.active:
            self.file.close()
            self.board.close()


def complete_lines(path: Path) -> list[dict[str, Any]]:
    """The records of an earlier run; a line cut off by a kill is dropped."""
    lines = []
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines
