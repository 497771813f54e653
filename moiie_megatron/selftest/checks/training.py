"""Training on the built-in data: a committed loss curve; save, resume and export."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from moiie_megatron.config.schema import DataConfig, RunConfig, SourceConfig
from moiie_megatron.convert.export import export_checkpoint
from moiie_megatron.convert.fill_model import fill_model
from moiie_megatron.convert.open_model import open_weights
from moiie_megatron.convert.verify import compare_tensors
from moiie_megatron.data.digits.dataset import write_digits
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.build import build_dataset, build_train_loader
from moiie_megatron.evaluation.compare_logits import logits, make_inputs, megatron_logits
from moiie_megatron.generation.checkpoint_config import checkpoint_config
from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.mcore.parallel import ParallelContext, seed_everything
from moiie_megatron.mcore.run import run_distributed
from moiie_megatron.selftest.check import (
    Finding,
    Session,
    failed,
    full_precision,
    passed,
    skipped,
)
from moiie_megatron.selftest.checks.models import Precision, seeded_weights, tiny_config
from moiie_megatron.training.loop import train
from moiie_megatron.training.state import prepare_training
from moiie_megatron.training.step import train_step
from moiie_megatron.training.stop import StopRequest
from moiie_megatron.utils.files import atomic_write
from moiie_megatron.vlm.build import build_chunks

CURVE: Final = Path(__file__).with_name("loss_curve.json")
STEPS: Final = 20
_MICRO_BATCHES: Final = 8  # of a step, each of one sample: at most so many data-parallel ranks
# Largest relative differences of a loss and of a gradient norm.  The CPU repeats the committed
# numbers to 1e-6 with other vector units; other kernels round every step anew, and so does bf16.
_CURVE_TOLERANCE: Final = {
    ("cpu", "fp32"): (1e-4, 1e-3),
    ("cuda", "fp32"): (1e-3, 1e-2),
    ("cpu", "bf16"): (2e-2, 1e-1),
    ("cuda", "bf16"): (2e-2, 1e-1),
}
_RESUME_TOLERANCE: Final = 1e-3  # of the losses after resuming, relative
_LOGITS_TOLERANCE: Final = 1e-3  # of the largest logit


def check_loss_curve(session: Session) -> Finding:
    """Losses and gradient norms of 20 steps against the committed ones of the CPU."""
    if _MICRO_BATCHES % session.groups.size:
        return skipped(
            f"its step has {_MICRO_BATCHES} micro-batches, which {session.groups.size} processes "
            "cannot share evenly"
        )
    wanted = json.loads(CURVE.read_text())
    figures: dict[str, Any] = {}
    sentences = []
    precisions: tuple[Precision, ...] = ("fp32",) if session.quick else ("fp32", "bf16")
    with _own_directory(session) as directory:
        if _samples(directory, session.local) != wanted["samples"]:
            return failed(
                "the samples are not those of the committed curve, so its numbers do not hold; "
                "Pillow, scikit-learn or sentencepiece work differently in these versions"
            )
        for precision in precisions:
            context = session.local if precision == "fp32" else session.groups
            with full_precision():
                found = loss_curve(directory, context, precision)
            worst = {
                name: max(_relative(a, b) for a, b in zip(found[name], wanted[name], strict=True))
                for name in ("lm_loss", "grad_norm")
            }
            figures[precision] = {**found, "difference": worst}
            allowed = _CURVE_TOLERANCE[session.device, precision]
            text = f"{precision}: loss within {worst['lm_loss']:.1e}"
            text += f" and gradient norm within {worst['grad_norm']:.1e}"
            if not all(w <= a for w, a in zip(worst.values(), allowed, strict=True)):
                limits = " and ".join(f"{limit:.0e}" for limit in allowed)
                return failed(f"{text} of the committed ones, not {limits}", **figures)
            sentences.append(text)
    return passed("; ".join(sentences) + " of the committed ones", **figures)


def loss_curve(
    directory: Path, context: ParallelContext, precision: Precision
) -> dict[str, list[float]]:
    """Train 20 steps from given weights; every rank returns the same.

    Args:
        directory: The built-in data is written there.
    """
    config = _curve_config(directory, context, precision)
    model = build_chunks(config, context)
    fill_model(model, seeded_weights(config))
    state = prepare_training(config, context, model, STEPS)
    state.model.train()
    loader = _loader(config, context.dp_rank, context.dp_size)
    results = [train_step(config, context, state, next(loader)) for _ in range(STEPS)]
    return {
        "lm_loss": [result.lm_loss for result in results],
        "grad_norm": [float(result.grad_norm) for result in results],
    }


def _curve_config(directory: Path, context: ParallelContext, precision: Precision) -> RunConfig:
    config = _digits_config(directory, context, precision, global_batch_size=_MICRO_BATCHES)
    return _updated(config, train={"micro_batch_size": 1, "steps": STEPS})


def _relative(found: float, wanted: float) -> float:
    return abs(found - wanted) / abs(wanted)


def _loader(config: RunConfig, dp_rank: int, dp_size: int) -> Iterator[list[Batch]]:
    return build_train_loader(
        config,
        build_dataset(config),
        consumed_samples=0,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )


def _samples(directory: Path, context: ParallelContext) -> str:
    """A digest of the first step's token ids and pixels: whether two machines train on the same."""
    digest = hashlib.sha256()
    for batch in next(_loader(_curve_config(directory, context, "fp32"), dp_rank=0, dp_size=1)):
        digest.update(batch.tokens.numpy().tobytes())
        digest.update(batch.images.numpy().tobytes())
    return digest.hexdigest()[:16]


def check_checkpoints(session: Session) -> Finding:
    """Save, resume at once, export, load the export in transformers."""
    assert session.directory is not None
    context = session.groups
    config = _digits_config(session.directory, context, "fp32", 2 * context.dp_size)
    whole = _updated(config, output=str(session.directory / "whole"), train={"steps": 4})
    parts = _updated(whole, output=str(session.directory / "parts"))
    first = _updated(parts, train={"exit_after_minutes": 1e-9})
    with _quiet(), full_precision():
        for run in (whole, first, parts):
            # Initial weights are drawn from the generators, which go on from run to run.
            seed_everything(run.train.seed, context.groups)
            train(run, context, StopRequest())
        checkpoint = session.directory / "parts"
        wanted, found = (_losses(Path(run.output)) for run in (whole, parts))
        worst = max(
            (_relative(a, b) for a, b in zip(found, wanted, strict=False)), default=float("nan")
        )
        if context.rank == 0 and (len(found) != len(wanted) or not worst <= _RESUME_TOLERANCE):
            problem = f"losses {found} with resuming after step 1 and {wanted} without"
        else:
            problem = ""
        export = _export(session.directory, checkpoint, context)
        difference = _compare_logits(checkpoint, export, session)
    if context.rank != 0:
        return passed("")
    figures = {"resumed_losses": found, "losses": wanted, "logits_difference": difference}
    tensors = compare_tensors(open_weights(checkpoint), open_weights(export))
    if problem:
        return failed(problem, **figures)
    if not tensors.is_equal:
        return failed(f"{len(tensors.mismatches)} exported tensors differ", **figures)
    if not difference <= _LOGITS_TOLERANCE:
        return failed(f"logits of the export differ by {difference:.1e} of the largest", **figures)
    return passed(
        f"losses after resuming within {worst:.1e}, {tensors.compared} exported tensors equal, "
        f"transformers' logits within {difference:.1e}",
        **figures,
    )


def _export(directory: Path, checkpoint: Path, context: ParallelContext) -> Path:
    export = directory / "export"
    if context.rank == 0:
        export_checkpoint(checkpoint, export)
    dist.barrier()
    return export


def _compare_logits(checkpoint: Path, export: Path, session: Session) -> float:
    """Largest difference of the export's logits, relative to the largest logit; on rank 0."""
    weights, context = open_weights(checkpoint), session.local
    inputs, _ = make_inputs(weights, open_weights(export))
    degree = context.groups.ep.size()
    config = checkpoint_config(
        weights.folder, [f"parallel.expert={degree}", "train.precision=fp32"]
    )
    ours = megatron_logits(weights.folder, config, context, inputs)
    if context.rank != 0:
        return 0.0
    theirs = logits(open_weights(export), inputs)
    pairs = [(a[..., : b.shape[-1]], b) for a, b in zip(ours, theirs, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def _losses(output: Path) -> list[float]:
    """The logged losses; on other ranks than 0 the file may not be there yet."""
    file = output / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["lm_loss"] for line in lines]


def _digits_config(
    directory: Path, context: ParallelContext, precision: Precision, global_batch_size: int
) -> RunConfig:
    """The tiny model on the built-in data, which is written first."""
    data = write_digits(directory / "digits", train=60, test=2)
    source = SourceConfig(records=str(data / "train.jsonl"), images=str(data / "images"))
    config = tiny_config(context.size, precision)
    return _updated(
        config,
        data=DataConfig(
            sources=[source],
            tokenizer=str(data / "tokenizer.model"),
            sequence_length=160,
            num_workers=0,
        ),
        train={"global_batch_size": global_batch_size, "device": context.device.type},
    )


def _updated(config: RunConfig, **sections: Any) -> RunConfig:
    """A copy with other values; those of a section by key."""
    changes = {
        name: getattr(config, name).model_copy(update=value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return config.model_copy(update=changes)


@contextmanager
def _own_directory(session: Session) -> Iterator[Path]:
    """The common directory, or one of this process: what is written is the same everywhere."""
    if session.directory is not None:
        yield session.directory
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that training logs."""
    logger = logging.getLogger("moiie_megatron")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def main() -> None:
    """Write the curve: only after a change that is meant to change what training computes."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)

        def body(context: ParallelContext) -> None:
            found["samples"] = _samples(directory, context)
            found.update(loss_curve(directory, context, "fp32"))

        config = _updated(tiny_config(1, "fp32"), train={"device": "cpu"})
        run_distributed(config, DistEnv(), body)
    with atomic_write(CURVE) as path:
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
