"""Conditions on the ``megatron`` section.

Every violated condition is one ``UserError`` sentence with the field, its value and the remedy.
Those that depend on the device are in ``mcore/device_checks.py``.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from moiie_megatron.config.megatron_section.sections import MEGATRON, megatron_fields
from moiie_megatron.config.messages import describe, divisors, listed, show
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.utils.errors import UserError


def check_megatron(config: RunConfig) -> None:
    """Refuse fields that may not be set, wrong values, and fields that would have no effect.

    Raises:
        UserError: The first one.
    """
    fields = megatron_fields(config)
    _check_recompute(config, fields)
    _check_fusions(config, fields)


def _check_recompute(config: RunConfig, fields: dict[str, Any]) -> None:
    granularity = fields.get("recompute_granularity")
    wanted = {
        "recompute_method": "full",
        "recompute_num_layers": "full",
        "recompute_modules": "selective",
    }
    for name, kind in wanted.items():
        if granularity != kind and name in fields:
            raise UserError(
                f"megatron.{name} is {show(fields[name])} but megatron.recompute_granularity is "
                f"{granularity or 'null'}: set it to {kind}, or leave {name} out."
            )
    needed = ("recompute_method", "recompute_num_layers") if granularity == "full" else ()
    missing = [
        f"megatron.{name} is not given (use {_choices(name)})"
        for name in needed
        if name not in fields
    ]
    if missing:
        raise UserError(f"megatron.recompute_granularity is full but {listed(missing, 'and')}.")
    if granularity == "full":
        _check_recomputed_layers(config, fields)
    if granularity == "selective":
        _check_recomputed_modules(config, fields.get("recompute_modules", ["core_attn"]))


def _check_recomputed_layers(config: RunConfig, fields: dict[str, Any]) -> None:
    number, sizes = fields["recompute_num_layers"], config.pipeline_layers
    if sizes is None:
        return  # refused below
    if number > max(sizes):
        raise UserError(
            f"megatron.recompute_num_layers is {number} but a pipeline stage has "
            f"{max(sizes)} layers: use at most that."
        )
    uneven = [size for size in sizes if size % number]
    if fields["recompute_method"] == "uniform" and uneven:
        raise UserError(
            f"megatron.recompute_num_layers is {number} but a pipeline stage has {uneven[0]} "
            f"layers: with recompute_method=uniform use {divisors(uneven[0])}."
        )


def _check_recomputed_modules(config: RunConfig, modules: list[str]) -> None:
    if not modules:
        raise UserError(
            f"megatron.recompute_modules is []: use some of {_choices('recompute_modules')}."
        )
    without_experts = [name for name in modules if name in ("moe", "moe_act", "layernorm")]
    if without_experts and not config.moe_layers:
        raise UserError(
            f"megatron.recompute_modules has {without_experts[0]} but the stage has no experts "
            f"(stage.moe is {str(config.stage.moe).lower()}, moe.variant is {config.moe.variant}): "
            "leave it out."
        )
    if "mlp" in modules and len(config.moe_layers) == config.language.num_layers:
        raise UserError(
            f"megatron.recompute_modules has mlp but all {config.language.num_layers} layers have "
            "experts: use moe."
        )


def _check_stages(config: RunConfig, fields: dict[str, Any]) -> None:
    names = [
        name
        for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
        if name in fields
    ]
    stages, layers = config.parallel.pipeline, config.language.num_layers
    if names and stages == 1:
        raise UserError(
            f"megatron.{names[0]} is {fields[names[0]]} but parallel.pipeline is 1: use 2 or more "
            "stages, or leave it out."
        )
    if names and config.pipeline_layers is None:
        given = listed((f"megatron.{name} is {fields[name]}" for name in names), "and")
        raise UserError(
            f"{given}, but language.num_layers is {layers} and parallel.pipeline is {stages}: the "
            "other stages must get the same number of layers each."
        )


def _check_fusions(config: RunConfig, fields: dict[str, Any]) -> None:
    if "cross_entropy_fusion_impl" in fields and fields.get("cross_entropy_loss_fusion") is False:
        raise UserError(
            f"megatron.cross_entropy_fusion_impl is {fields['cross_entropy_fusion_impl']} but "
            "megatron.cross_entropy_loss_fusion is false: leave one of them out."
        )
    if "moe_permute_fusion" not in fields:
        return
    given = f"megatron.moe_permute_fusion is {str(fields['moe_permute_fusion']).lower()}"
    if not config.moe_layers:
        raise UserError(
            f"{given} but the stage has no experts (stage.moe is {str(config.stage.moe).lower()}, "
            f"moe.variant is {config.moe.variant}): leave it out."
        )
    if config.moe.dispatcher == "moiie":
        raise UserError(
            f"{given} but moe.dispatcher is moiie, which sorts rows in its own way: leave it out, "
            "or use moe.dispatcher=alltoall."
        )


def _choices(name: str) -> str:
    """The values of a field in words."""
    schema = TypeAdapter(MEGATRON.allowed[name].kind).json_schema()
    return describe(schema.get("items", schema), {})
