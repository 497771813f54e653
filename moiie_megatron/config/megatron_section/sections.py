"""The three sections, and the values that a run gives in them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Final

from pydantic import ConfigDict, TypeAdapter, ValidationError

from moiie_megatron.config.megatron_section.data_parallel import ALLOWED as DDP_ALLOWED
from moiie_megatron.config.megatron_section.data_parallel import OWNED as DDP_OWNED
from moiie_megatron.config.megatron_section.data_parallel import REFUSED as DDP_REFUSED
from moiie_megatron.config.megatron_section.optimizer import ALLOWED as OPTIMIZER_ALLOWED
from moiie_megatron.config.megatron_section.optimizer import OWNED as OPTIMIZER_OWNED
from moiie_megatron.config.megatron_section.optimizer import REFUSED as OPTIMIZER_REFUSED
from moiie_megatron.config.megatron_section.table import Allowed, MegatronSection
from moiie_megatron.config.megatron_section.transformer.allowed import ALLOWED
from moiie_megatron.config.megatron_section.transformer.owned import OWNED
from moiie_megatron.config.megatron_section.transformer.refused import REFUSED
from moiie_megatron.config.messages import advice, show
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.utils.errors import UserError

PAGE: Final = "docs/megatron-section.md"
_CONFIG: Final = ConfigDict(allow_inf_nan=False)

MEGATRON: Final = MegatronSection("megatron", "TransformerConfig", ALLOWED, OWNED, REFUSED)
DDP: Final = MegatronSection(
    "ddp", "DistributedDataParallelConfig", DDP_ALLOWED, DDP_OWNED, DDP_REFUSED
)
OPTIMIZER: Final = MegatronSection(
    "optimizer.megatron", "OptimizerConfig", OPTIMIZER_ALLOWED, OPTIMIZER_OWNED, OPTIMIZER_REFUSED
)
SECTIONS: Final = (MEGATRON, DDP, OPTIMIZER)


def megatron_fields(config: RunConfig) -> dict[str, Any]:
    """The fields of TransformerConfig that a run sets, with values of their types.

    Raises:
        UserError: The first field that does not exist, may not be set, or has a wrong value.
    """
    return _fields(MEGATRON, config.megatron)


def ddp_fields(config: RunConfig) -> dict[str, Any]:
    """The same for DistributedDataParallelConfig."""
    return _fields(DDP, config.ddp)


def optimizer_fields(config: RunConfig) -> dict[str, Any]:
    """The same for OptimizerConfig; a dtype is ``fp32``, ``bf16`` or ``fp16``."""
    return _fields(OPTIMIZER, config.optimizer.megatron)


def _fields(section: MegatronSection, given: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: _value(section, name, value) for name, value in given.items()}
    return {name: value for name, value in values.items() if value is not None}


def _value(section: MegatronSection, name: str, value: Any) -> Any:
    known = section.classify(name)
    key = f"{section.key}.{name}"
    if known is None:
        raise UserError(f"{key} is not a known key: {_instead(section, name)}")
    if isinstance(known, str):
        raise UserError(
            f"{key} is {show(value)}, but {name} is set by {known}: leave it out of the "
            f"{section.key} section."
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


def _instead(section: MegatronSection, name: str) -> str:
    """Where an unknown field belongs, the most similar one, or the page."""
    for other in SECTIONS:
        if name in other.allowed:
            return f"it belongs to the section {other.key}."
    close = difflib.get_close_matches(name, section.allowed, n=1)
    return f"did you mean {close[0]}?" if close else f"{PAGE} lists those that may be set."
