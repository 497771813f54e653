"""Conditions on the ``megatron`` section.

Every violated condition is one ``UserError`` sentence with the field, its value and the remedy.
Those that depend on the device are in ``mcore/config.py``.
"""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from moiie_megatron.config.megatron_section.allowed import ALLOWED, Allowed
from moiie_megatron.config.megatron_section.fields import classify
from moiie_megatron.config.messages import advice, describe, divisors, listed, show
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.utils.errors import UserError

PAGE = "docs/megatron-section.md"
_CONFIG = ConfigDict(allow_inf_nan=False)


def megatron_fields(config: RunConfig) -> dict[str, Any]:
    """The fields of the ``megatron`` section that are set, with values of their types.

    Raises:
        UserError: The first field that does not exist, may not be set, or has a wrong value.
    """
    values = {name: _value(name, value) for name, value in config.megatron.items()}
    return {name: value for name, value in values.items() if value is not None}


def check_megatron(config: RunConfig) -> None:
    """Refuse fields that may not be set, wrong values, and fields that would have no effect.

    Raises:
        UserError: The first one.
    """
    fields = megatron_fields(config)
    _check_recompute(config, fields)


def _value(name: str, value: Any) -> Any:
    known = classify(name)
    key = f"megatron.{name}"
    if known is None:
        close = difflib.get_close_matches(name, ALLOWED, n=1)
        instead = f"did you mean {close[0]}?" if close else f"{PAGE} lists those that may be set."
        raise UserError(f"{key} is not a known key: {instead}")
    if isinstance(known, str):
        raise UserError(
            f"{key} is {show(value)}, but {name} is set by {known}: leave it out of the megatron "
            "section."
        )
    if not isinstance(known, Allowed):
        raise UserError(f"{key} is {show(value)}, but {known.reason}: {known.instead}.")
    if value is None:
        return None
    adapter: TypeAdapter[Any] = TypeAdapter(known.kind, config=_CONFIG)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise UserError(
            f"{key} is {show(value)}: use {advice(error.errors()[0], adapter.json_schema(), {})}."
        ) from error


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


def _choices(name: str) -> str:
    """The values of a field in words."""
    schema = TypeAdapter(ALLOWED[name].kind).json_schema()
    return describe(schema.get("items", schema), {})
