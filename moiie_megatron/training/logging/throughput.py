"""How fast a run is, and how long it waits for data."""

from __future__ import annotations

import torch

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.planning.flops import model_flops
from moiie_megatron.planning.gpu_peaks import peak_flops
from moiie_megatron.training.step import StepResult

_TERA = 1e12


class Throughput:
    """Adds up steps until a line of the log is due.  It needs counts that steps make anyway."""

    def __init__(self, config: RunConfig, context: ParallelContext) -> None:
        self._flops = model_flops(config)
        self._image_tokens = config.vision.num_image_tokens
        self._ranks = context.size
        self._peak = _peak(config, context)
        self._reset()

    def add(self, result: StepResult, data_wait: float) -> None:
        """Count a step.

        Args:
            data_wait: Seconds that the rank with the slowest data has waited for it.
        """
        self._done_tokens += result.tokens
        self._done_flops += self._flops.of(result.work(self._image_tokens))
        self._data_wait += data_wait

    def take(self, seconds: float) -> dict[str, float]:
        """What the steps since the last call come to, if they took that long.

        Returns:
            ``tokens_per_second`` (without padding, all ranks), ``tflops_per_rank`` (model FLOPs,
            ``planning/flops.py``), ``mfu`` (the fraction of the device's peak, where that is
            known) and ``data_wait_fraction``.
        """
        seconds = max(seconds, 1e-9)
        rate = self._done_flops / seconds / self._ranks
        values = {
            "tokens_per_second": self._done_tokens / seconds,
            "tflops_per_rank": rate / _TERA,
            **({} if self._peak is None else {"mfu": rate / self._peak}),
            "data_wait_fraction": min(self._data_wait / seconds, 1.0),
        }
        self._reset()
        return values

    def _reset(self) -> None:
        self._done_tokens = 0
        self._done_flops = self._data_wait = 0.0


def describe(values: dict[str, float]) -> str:
    """The rates for the operator's line."""
    tflops = values["tflops_per_rank"]
    small = tflops < 1
    return (
        f"{values['tokens_per_second']:.0f} tok/s | "
        f"{tflops * 1e3 if small else tflops:.1f} {'GFLOP' if small else 'TFLOP'}/s/rank | "
        + (f"MFU {values['mfu']:.1%} | " if "mfu" in values else "")
        + f"data wait {values['data_wait_fraction']:.1%}"
    )


def _peak(config: RunConfig, context: ParallelContext) -> float | None:
    """FLOP/s at the peak; None where it is not known: CPUs, other GPUs, fp32."""
    if config.log.peak_tflops is not None:
        return config.log.peak_tflops * _TERA
    if not context.device.is_cuda or config.train.precision != "bf16":
        return None
    return peak_flops(torch.cuda.get_device_name())
