"""How fast the layer and a training step are: figures, judged only where they are absurd.

On a CPU the same code runs at toy size, and the figures mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
import torch.distributed as dist

from moiie_megatron.config.schema import LanguageConfig, RunConfig, VisionConfig
from moiie_megatron.data.packing.pack import pack
from moiie_megatron.data.packing.rows import PackingSpec
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.planning.flops import model_flops
from moiie_megatron.planning.gpu_peaks import peak_flops
from moiie_megatron.planning.parameters import count_parameters
from moiie_megatron.selftest.check import Finding, Session, failed, passed
from moiie_megatron.selftest.checks.layer_case import Case, GemmLimit, moiie_layer
from moiie_megatron.selftest.checks.models import example, tiny_config
from moiie_megatron.training.state import prepare_training
from moiie_megatron.training.step import StepResult, train_step
from moiie_megatron.utils.timing import Timings, interleave, slower_rank
from moiie_megatron.vlm.build import build_chunks, te_experts

_IMAGE_FRACTION: Final = 0.7
_ABSURD_RATIO: Final = 20.0  # of the layer's time to that of its matrix products
_ABSURD_MFU: Final = 0.01
_STATE_BYTES: Final = 18  # per parameter: bf16 weight, fp32 gradient, weight and two moments
_ROOM: Final = 20e9  # bytes for activations and libraries
_LONGEST: Final = 2048  # tokens of a sample of the large model
_TOY: Final = ", at toy size"
# Hidden size, FFN size, tokens and dtype of the layer, by device.
LAYER: Final = {
    "cuda": (2048, 8192, 8192, torch.bfloat16),
    "cpu": (64, 96, 128, torch.float32),
}


def check_layer_speed(session: Session) -> Finding:
    """The MoIIE layer against its matrix products alone and against its peers."""
    context, is_cuda = session.groups, session.is_cuda
    device = context.device.torch_device
    hidden, ffn, tokens, dtype = LAYER[session.device]
    case = Case.make(hidden, ffn, dtype, tokens, _IMAGE_FRACTION, device=device)
    case.config.moe_grouped_gemm = True
    case.config.expert_model_parallel_size = context.groups.ep.size()
    limit = GemmLimit(case)
    runs: dict[str, Callable[[], object]] = {
        "limit": limit.step,
        "moiie": case.layer_step(moiie_layer(case, context)),
        "alltoall": case.layer_step(moiie_layer(case, context, dispatcher=None)),
    }
    if context.device.transformer_engine:
        runs["moiie, TE experts"] = case.layer_step(
            moiie_layer(case, context, experts=te_experts())
        )
    rounds = 20 if is_cuda and not session.quick else 3
    together = {name: _together(run) for name, run in runs.items()}
    timings = slower_rank(interleave(together, rounds=rounds, device=device), device)
    figures = _layer_figures(timings, limit, runs)
    ratios = {name: timings.ratio(name, "limit") for name in runs if name != "limit"}
    text = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    if is_cuda and ratios["moiie"] > _ABSURD_RATIO:
        return failed(f"times of the matrix products' time: {text}", **figures)
    return passed(f"times of the matrix products' time: {text}{_toy(session)}", **figures)


def _layer_figures(
    timings: Timings, limit: GemmLimit, runs: dict[str, Callable[[], object]]
) -> dict[str, Any]:
    return {
        "milliseconds": {name: round(1e3 * timings.median(name), 3) for name in runs},
        "limit_tflops": round(limit.flops / timings.median("limit") / 1e12, 2),
        "moiie_over_limit": round(timings.ratio("moiie", "limit"), 3),
        "moiie_over_alltoall": round(timings.ratio("moiie", "alltoall"), 3),
    }


def _together(run: Callable[[], object]) -> Callable[[], None]:
    """All ranks start at once."""

    def wrapped() -> None:
        dist.barrier()
        run()

    return wrapped


def _toy(session: Session) -> str:
    return "" if session.is_cuda else _TOY


def check_step_speed(session: Session) -> Finding:
    """Tokens per second, MFU and memory of stage 2 of a model with the shapes of a 1B Llama."""
    context = session.groups
    config = _step_config(session)
    if config is None:
        return failed("the GPU has too little memory for the smallest of its models")
    state = prepare_training(config, context, build_chunks(config, context), steps=100)
    state.model.train()
    batches = _packed_rows(config, context)
    device = context.device.torch_device
    if session.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    rounds = 5 if session.is_cuda else 2
    results: list[StepResult] = []
    run = {"step": lambda: results.append(train_step(config, context, state, batches))}
    timings = slower_rank(interleave(run, rounds=rounds, warmup=2, device=device), device)
    seconds = timings.median("step")
    # Other ranks have the same lengths, with other contents.
    rate = context.dp_size * sum(len(batch.tokens[0]) for batch in batches) / seconds
    figures: dict[str, Any] = {
        "layers": config.language.num_layers,
        "parameters": count_parameters(config).total,
        "seconds": round(seconds, 4),
        "tokens_per_second_per_rank": round(rate / context.size, 1),
        "losses": [result.lm_loss for result in results],
    }
    text = f"{rate / context.size:.0f} tokens/s per rank"
    if not all(result.updated for result in results):
        return failed("a loss or gradient was not finite", **figures)
    if session.is_cuda:
        flops = model_flops(config).of(results[-1].work(config.vision.num_image_tokens))
        text += _cuda_figures(figures, flops / seconds / context.size)
        if figures["mfu"] is not None and figures["mfu"] < _ABSURD_MFU:
            return failed(text, **figures)
    return passed(text + _toy(session), **figures)


def _cuda_figures(figures: dict[str, Any], flops: float) -> str:
    """Add rates and memory of this GPU; return them as words."""
    name = torch.cuda.get_device_name()
    peak, memory = peak_flops(name), torch.cuda.max_memory_allocated()
    figures["tflops_per_rank"] = round(flops / 1e12, 1)
    figures["mfu"] = None if peak is None else round(flops / peak, 4)
    figures["peak_memory_gib"] = round(memory / 2**30, 2)
    mfu = "MFU unknown for this GPU" if peak is None else f"MFU {flops / peak:.1%}"
    return f", {flops / 1e12:.0f} TFLOP/s, {mfu}, {memory / 2**30:.1f} GiB at the peak"


def _step_config(session: Session) -> RunConfig | None:
    """The largest model that fits: 16, 8, 4 or 2 layers; None if none does."""
    if not session.is_cuda:
        config = tiny_config(session.groups.size, "fp32", packing=True)
        return _with_rows(config, 2, config.data.sequence_length)
    memory = torch.cuda.get_device_properties(session.dist_env.local_rank).total_memory
    for layers in (16, 8, 4, 2):
        config = large_config(session.groups.size, layers)
        if _STATE_BYTES * count_parameters(config).total + _ROOM < memory:
            return config
    return None


def large_config(ranks: int, layers: int) -> RunConfig:
    """Llama-3.2-1B's shapes with a vocabulary of 32,000, and half of SigLIP-so400m's layers."""
    config = tiny_config(ranks, "bf16", packing=True)
    language = LanguageConfig(
        family="llama",
        num_layers=layers,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=32,
        num_query_groups=8,
        vocab_size=32000,
        max_position_embeddings=8192,
    )
    vision = VisionConfig(
        family="siglip",
        hidden_size=1152,
        ffn_hidden_size=4304,
        num_layers=14,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        activation="gelu_pytorch_tanh",
    )
    moe = config.moe.model_copy(update={"layers": "interleaved"})
    # With random weights the tiny model's rates might not stay finite.
    rates = dict.fromkeys(config.stage.learning_rates, 1e-5)
    stage = config.stage.model_copy(update={"learning_rates": rates})
    config = config.model_copy(
        update={"language": language, "vision": vision, "moe": moe, "stage": stage}
    )
    return _with_rows(config, 2, _LONGEST)


def _with_rows(config: RunConfig, samples: int, length: int) -> RunConfig:
    """Micro-batches of one row with room for so many samples of so many tokens."""
    data = config.data.model_copy(update={"sequence_length": length})
    train = config.train.model_copy(update={"micro_batch_size": samples})
    return config.model_copy(update={"data": data, "train": train})


def _packed_rows(config: RunConfig, context: ParallelContext) -> list[Batch]:
    """Two full rows of a rank: samples with an image, and one without."""
    return list(_rows(config, context.rank))


def _rows(config: RunConfig, seed: int) -> Iterator[Batch]:
    length, num_image_tokens = config.data.sequence_length, config.vision.num_image_tokens
    capacity = config.micro_batch_shape[1]
    spec = PackingSpec(capacity, length, num_image_tokens, pad_id=0)
    for number in range(2):
        generator = torch.Generator().manual_seed(2 * seed + number)
        samples = [
            example(generator, length - images * num_image_tokens, images, config)
            for images in (1, number)
        ]
        yield from pack(samples, spec)
