"""One training step of a tiny model for every field that the ``megatron`` section may set."""

from __future__ import annotations

import dataclasses
import os
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Union, get_args, get_origin, get_type_hints
from unittest import mock

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from moiie_megatron.config.megatron_section.sections import MEGATRON
from moiie_megatron.config.megatron_section.table import Refused
from moiie_megatron.config.megatron_section.transformer.allowed import ALLOWED
from moiie_megatron.config.schema import MoEConfig, RunConfig, StageConfig
from moiie_megatron.config.validate import check_config
from moiie_megatron.mcore.parallel import ParallelContext, seed_everything
from moiie_megatron.training.state import prepare_training
from moiie_megatron.training.step import train_step
from moiie_megatron.vlm.build import build_chunks
from tests.helpers.batches import image_batch, text_batch
from tests.parity import tiny

# Fields that are tried together; the first one is what the case is about.
Case = dict[str, Any]

_FULL = {"recompute_granularity": "full"}
_SELECTIVE = {"recompute_granularity": "selective"}

# On local modules, with the whole model in one process.  The cases of other fields are below.
CASES: tuple[Case, ...] = (
    {**_FULL, "recompute_method": "uniform", "recompute_num_layers": 2},
    {"recompute_method": "uniform", **_FULL, "recompute_num_layers": 1},
    {"recompute_method": "block", **_FULL, "recompute_num_layers": 1},
    {"recompute_num_layers": 2, **_FULL, "recompute_method": "block"},
    dict(_SELECTIVE),
    {"recompute_modules": ["core_attn", "mlp"], **_SELECTIVE},
    {"recompute_modules": ["moe"], **_SELECTIVE},
    {"init_method_std": 0.05},
    {"embedding_init_method_std": 0.05},
    {"hidden_dropout": 0.2},
    {"attention_dropout": 0.2},
    {"bias_activation_fusion": True},
    {"bias_activation_fusion": False},
    {"bias_dropout_fusion": True},
    {"cross_entropy_loss_fusion": False},
    {"cross_entropy_fusion_impl": "native", "cross_entropy_loss_fusion": True},
    {"apply_rope_fusion": False},
)

# With Transformer Engine's modules, besides those above.
TE_CASES: tuple[Case, ...] = (
    {"recompute_modules": ["layernorm"], **_SELECTIVE},
    {"recompute_modules": ["moe_act"], **_SELECTIVE},
    {"attention_backend": "unfused"},
    {"apply_rope_fusion": True},
    {"moe_permute_fusion": True},
)

FIELDS = {field.name: field for field in dataclasses.fields(TransformerConfig)}
# Fields of the installed Megatron-Core that are refused because they change nothing.
INERT = [
    name for name in FIELDS if isinstance(kind := MEGATRON.classify(name), Refused) and kind.inert
]


def needs_experts(case: Case) -> bool:
    """Whether a case has no meaning in a dense model."""
    modules = case.get("recompute_modules", ())
    return "moe_permute_fusion" in case or bool({"moe", "moe_act", "layernorm"} & set(modules))


def name_of(case: Case) -> str:
    """A short name for pytest."""
    return ",".join(f"{name}={value}" for name, value in case.items())


def tiny_config(experts: bool, dispatcher: str = "moiie", **megatron: Any) -> RunConfig:
    """A run of two layers, of which the second has experts; everything trains."""
    if "moe_permute_fusion" in megatron:
        dispatcher = "alltoall"
    moe = MoEConfig(dispatcher=dispatcher) if experts else None
    config = tiny.run_config(tiny.language("llama", num_layers=2), moe, megatron=megatron)
    parts = ("vision", "connector", "language", *(("moe",) if experts else ()))
    stage = StageConfig(
        **config.stage.model_dump() | {"learning_rates": dict.fromkeys(parts, 1e-3)}
    )
    data = config.data.model_copy(update={"sequence_length": 40, "padding": "sequence_length"})
    train = config.train.model_copy(update={"global_batch_size": 4, "micro_batch_size": 2})
    return config.model_copy(update={"stage": stage, "data": data, "train": train})


def take_step(
    config: RunConfig, context: ParallelContext, forced: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Losses and all gradients of one step on two micro-batches, from weights of one seed.

    Args:
        forced: Fields that TransformerConfig gets although the configuration may not set them.

    Raises:
        UserError: The configuration is refused.
    """
    check_config(config, world_size=context.size)
    seed_everything(3, context.groups)
    with _no_attention_backend(), _forced(forced or {}):
        model = build_chunks(config, context)
    state = prepare_training(config, context, model, steps=2)
    state.model.train()
    result = train_step(config, context, state, [image_batch(0), text_batch(1)])
    found = {f"grad/{n}": p.main_grad for n, p in model.named_parameters() if p.requires_grad}
    return found | {"losses": result.micro_batch_losses, "norm": torch.tensor(result.grad_norm)}


@contextmanager
def _no_attention_backend() -> Iterator[None]:
    """Without the variables that Megatron has set for models of other tests."""
    with mock.patch.dict(os.environ):
        for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
            os.environ.pop(name, None)
        yield


def _forced(fields: Mapping[str, Any]) -> Any:
    create = TransformerConfig.__init__

    def init(self: TransformerConfig, **values: Any) -> None:
        create(self, **(values | fields))

    return mock.patch.object(TransformerConfig, "__init__", init)


def largest_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Of all losses and gradients, relative to the largest value of each tensor or of 1e-3."""
    assert found.keys() == wanted.keys()
    return max(
        float((found[name] - want).abs().max() / want.abs().max().clamp(min=1e-3))
        for name, want in wanted.items()
    )


def check_case(case: Case, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Losses and gradients differ from those without the field as the table says."""
    difference = largest_difference(found, wanted)
    assert all(values.isfinite().all() for values in found.values())
    losses = ALLOWED[next(iter(case))].losses
    if losses == "the same":
        assert difference == 0.0
    elif losses == "the same up to rounding":
        assert difference < 1e-5
    else:
        assert difference > 1e-4


def another_value(name: str) -> Any:
    """A value of a field's type that is not its default."""
    kind = get_type_hints(TransformerConfig)[name]
    is_union = get_origin(kind) in (Union, types.UnionType)
    kinds = [part for part in get_args(kind) if part is not type(None)] if is_union else [kind]
    default = FIELDS[name].default
    if kind is bool:
        return not default
    values: dict[Any, tuple[Any, ...]] = {int: (2, 3), float: (0.5, 0.25), str: ("other",)}
    values |= {bool: (True,), list[int]: ([1],), list[str]: (["other"],)}
    literals = [part for part in get_args(kinds[0]) if isinstance(part, str)]
    return next(value for value in (*literals, *values.get(kinds[0], (1,))) if value != default)
