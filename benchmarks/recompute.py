r"""What a configuration recomputes and keeps: FLOPs per token and activations in memory.

    MOIIE_TEST_TE=.venv/transformer-engine-2.12.0 PYTHONPATH=tests/te/site:. \
        python benchmarks/recompute.py

Layers are run forward and backward on the CPU, with Transformer Engine's modules over the tests'
stand-in for its kernels, and counted: FLOPs of all matrix products and of attention
(torch.utils.flop_counter), and the bytes of what autograd keeps between the passes.  Widths and
heads are an eighth of the configuration's, so that FLOPs per token are a 64th and bytes per token
an eighth of the real ones; rows are short, and the FLOPs of attention grow with their length.  A
layer is a small model less one without that layer.  Vision encoder, output layer and losses are
not counted.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.layout.token_types import IMAGE, TEXT
from moiie_megatron.mcore.parallel import DistEnv, ParallelContext, destroy_parallel, init_parallel
from moiie_megatron.planning.parameters import count_parameters
from moiie_megatron.training.stages import apply_stage
from moiie_megatron.vlm.build import build_chunks
from moiie_megatron.vlm.model import MoIIEModel

EXAMPLES = Path(__file__).resolve().parents[1] / "examples/configs"
SHIPPED = ("llama3-stage1", "llama3-stage2", "phi3-stage1", "phi3-stage2")
EVERYTHING = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
SCALE = 8
TOKENS = 64
COLUMNS = (
    "configuration",
    "recompute",
    "GFLOP per token",
    "recomputed",
    "fraction",
    "KiB kept per token",
    "tokens of a micro-batch",
    "GB of activations per GPU",
    "GB of states per GPU",
)
GIGA = 1e9


@dataclass(frozen=True)
class Layer:
    """One layer, per token and at full size.

    Attributes:
        flops: Of the forward and backward pass, recomputation included.
        kept: Bytes that it keeps between the two passes.
    """

    flops: float
    kept: float

    def __sub__(self, other: Layer) -> Layer:
        return Layer(self.flops - other.flops, self.kept - other.kept)


@dataclass(frozen=True)
class Plan:
    """All layers of a run, per token and at full size.

    Attributes:
        flops: Of forward and backward pass without recomputation.
        recomputed: FLOPs that recomputation adds.
        kept: Bytes that are kept between the passes; of all tensor-parallel ranks together.
    """

    flops: float
    recomputed: float
    kept: float

    @property
    def fraction(self) -> float:
        """Recomputed FLOPs over those of a run that recomputes nothing."""
        return self.recomputed / self.flops


def plan_recompute(config: RunConfig, context: ParallelContext, megatron: dict[str, Any]) -> Plan:
    """What a run without pipeline stages recomputes and keeps with a ``megatron`` section."""
    without = {k: v for k, v in megatron.items() if not k.startswith("recompute")}
    block = megatron.get("recompute_method") == "block"
    # The layers of a block that are recomputed are so one by one, the others not at all.
    section = without | EVERYTHING if block else megatron
    plain, chosen = (measure(config, context, fields) for fields in (without, section))
    flops = recomputed = kept = 0.0
    for number in range(config.language.num_layers):
        experts = number in config.moe_layers
        is_chosen = not block or number < megatron["recompute_num_layers"]
        layer = chosen[experts] if is_chosen else plain[experts]
        flops += plain[experts].flops
        recomputed += layer.flops - plain[experts].flops
        kept += layer.kept
    return Plan(flops, recomputed, kept)


def measure(
    config: RunConfig, context: ParallelContext, megatron: dict[str, Any]
) -> dict[bool, Layer]:
    """A dense layer (False) and one with experts (True), if the run has any."""
    kinds = (False, True) if config.moe_layers else (False,)
    base = _measure_model(scaled(config, kinds, megatron), context)
    found = {}
    for kind in kinds:
        layers = sorted((*kinds, kind))
        layer = _measure_model(scaled(config, layers, megatron), context) - base
        found[kind] = Layer(layer.flops * SCALE**2, layer.kept * SCALE)
    return found


def scaled(config: RunConfig, layers: Sequence[bool], megatron: dict[str, Any]) -> RunConfig:
    """The run with narrow layers, dense or with experts, in one process."""
    language = config.language.model_copy(
        update={
            "num_layers": len(layers),
            "hidden_size": config.language.hidden_size // SCALE,
            "ffn_hidden_size": config.language.ffn_hidden_size // SCALE,
            "num_attention_heads": config.language.num_attention_heads // SCALE,
            "num_query_groups": config.language.num_query_groups // SCALE,
            "head_dim": config.language.head_size,
            "vocab_size": 64,
        }
    )
    moe = config.moe.model_copy(
        update={"layers": [number for number, experts in enumerate(layers) if experts]}
    )
    vision = config.vision.model_copy(
        update={"hidden_size": 32, "ffn_hidden_size": 64, "num_layers": 2, "num_attention_heads": 2}
    )
    data = config.data.model_copy(update={"packing": False})
    parallel = type(config.parallel)()
    return config.model_copy(
        update={
            "language": language,
            "moe": moe,
            "vision": vision,
            "data": data,
            "parallel": parallel,
            "megatron": {"bias_activation_fusion": True} | megatron,  # as on GPUs
        }
    )


def _measure_model(config: RunConfig, context: ParallelContext) -> Layer:
    """A whole model on one row of half image tokens and half text tokens."""
    chunks = build_chunks(config, context)
    apply_stage(chunks, config.stage)
    (model,) = chunks
    model.train()
    embeds = torch.randn(1, TOKENS, config.language.hidden_size, dtype=model.config.params_dtype)
    kinds = torch.full((1, TOKENS), TEXT, dtype=torch.int8)
    kinds[:, : TOKENS // 2] = IMAGE
    counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
    kept = _Kept(model)
    with counter:
        with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
            losses = model(
                tokens=torch.zeros(1, TOKENS, dtype=torch.int64),
                position_ids=torch.arange(TOKENS).unsqueeze(0),
                token_types=kinds,
                inputs_embeds=embeds.requires_grad_(),
                labels=torch.full((1, TOKENS), 1),
            )
        size = kept.size()
        losses.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(counts.get(operation, 0) for operation in _ATTENTION)
    # Of a row that is an eighth of the longest one, as everything else.
    longer = config.data.sequence_length / SCALE / TOKENS
    flops = sum(counts.values()) + attention * (longer - 1)
    return Layer(flops / TOKENS, size / TOKENS)


class _Kept:
    """Storages that autograd keeps, without those of the model itself."""

    def __init__(self, model: MoIIEModel) -> None:
        own = (*model.parameters(), *model.buffers())
        self._own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._tensors: list[Tensor] = []

    def add(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in self._own:
            self._tensors.append(tensor)
        return tensor

    def size(self) -> int:
        """Bytes now; outputs that are discarded to be recomputed have none."""
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in self._tensors}
        return sum(storage.nbytes() for storage in storages.values())


def _forward_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of torch's attention on the CPU, which its counter does not know; a half is masked."""
    batch, heads, length, width = query
    return int(batch * heads * length * key[2] * (width + value[3]))


def _backward_flops(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """Four products for the two of the forward pass; its scores are not counted again."""
    return 2 * _forward_flops(query, key, value)


_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_flops,
}


def states(config: RunConfig, world: int) -> float:
    """Bytes per GPU of weights, fp32 gradients and optimizer states, shared as evenly as can be."""
    count, parallel = count_parameters(config), config.active_parallel
    images = count.vision + count.connector
    language = count.total - images - count.experts
    size = 0.0
    for parameters, part, degree in (
        (count.vision, "vision", 1),
        (count.connector, "connector", 1),
        (language, "language", parallel.tensor),
        (count.experts, "moe", parallel.expert),
    ):
        copies = world // (parallel.expert if part == "moe" else parallel.tensor)
        trained = 4 + 12 / copies if part in config.stage.learning_rates else 0
        size += parameters / degree * (2 + trained)
    return size


def load_example(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A configuration; the paths in it are not looked at."""
    for name in re.findall(r"\$\{(\w+)\}", path.read_text()):
        os.environ.setdefault(name, "unused")
    return load_config(path, [*overrides, "train.device=cpu"])


def row(name: str, config: RunConfig, context: ParallelContext, megatron: dict[str, Any]) -> str:
    """A line of the table."""
    plan = plan_recompute(config, context, megatron)
    rows, length = config.micro_batch_shape
    activations = plan.kept * rows * length / config.active_parallel.tensor
    return (
        f"| {name} | {plan.flops / GIGA:.1f} | {plan.recomputed / GIGA:.1f} | {plan.fraction:.1%} "
        f"| {plan.kept / 1024:.0f} | {rows * length} | {activations / GIGA:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Count what configurations recompute and keep.")
    parser.add_argument("configs", nargs="*", type=Path, help="default: those of examples/configs")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of a configuration")
    parser.add_argument("--world", type=int, default=8, help="GPUs")
    arguments = parser.parse_args()
    configs = arguments.configs or [EXAMPLES / f"{name}.yaml" for name in SHIPPED]
    torch.set_num_threads(1)
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    for path in configs:
        config = load_example(path, arguments.set)
        if config.parallel.pipeline > 1:
            parser.error(f"{path} has pipeline stages: use --set parallel.pipeline=1")
        context = init_parallel(type(config.parallel)(), DistEnv(), device="cpu", seed=1)
        for name, megatron in (("all", EVERYTHING), ("given", config.megatron)):
            line = row(f"{path.stem} | {name}", config, context, megatron)
            print(f"{line} {states(config, arguments.world) / GIGA:.0f} |", flush=True)
        destroy_parallel()


if __name__ == "__main__":
    main()
