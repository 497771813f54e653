"""What a configuration needs of the machine, checked before anything is built or written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from megatron.core.transformer.moe import fused_a2a

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.device import Device
from moiie_megatron.utils.errors import UserError

# Variables by which Megatron tells Transformer Engine the kernels that it may use, and their
# values by attention_backend (models/common/language_module/language_module.py).
_VARIABLES: Final = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
_BACKENDS: Final = {"auto": "111", "flash": "100", "fused": "010", "unfused": "001"}


def check_device(config: RunConfig, device: Device, fields: Mapping[str, Any]) -> None:
    """Refuse settings that need a library, or an environment, that this process does not have.

    Args:
        config: The run.
        device: Where it runs.
        fields: Its ``megatron`` section (``megatron_fields``).

    Raises:
        UserError: The first such setting.
    """
    if not device.transformer_engine:
        for what in _of_transformer_engine(fields):
            raise UserError(
                f"megatron.{what} needs Transformer Engine's modules, but the model uses local "
                f"ones (device: {device.type}, train.transformer_impl: "
                f"{config.train.transformer_impl}): leave it out."
            )
    backend = fields.get("attention_backend", "auto")
    for name, wanted in zip(_VARIABLES, _BACKENDS[backend], strict=True):
        value = os.environ.get(name, wanted)
        if value != wanted:
            raise UserError(
                f"{name} is {value} in the environment, but megatron.attention_backend is "
                f"{backend}: unset {name} and choose with megatron.attention_backend."
            )
    if config.moe_layers and config.moe.dispatcher == "flex" and not fused_a2a.HAVE_DEEP_EP:
        raise UserError(
            "moe.dispatcher is flex, which needs the package deep_ep, and it is not installed: "
            "install DeepEP, or use moe.dispatcher=moiie."
        )


def _of_transformer_engine(fields: Mapping[str, Any]) -> Iterator[str]:
    """The fields, with their values, that Transformer Engine alone has."""
    if "attention_backend" in fields:
        yield f"attention_backend={fields['attention_backend']}"
    if fields.get("apply_rope_fusion"):
        yield "apply_rope_fusion=true"
    for module in fields.get("recompute_modules", ()):
        if module in ("layernorm", "moe_act"):
            yield f"recompute_modules=[{module}]"


@contextmanager
def own_attention_backend() -> Iterator[None]:
    """Take back, at the end, the environment variables that Megatron sets for a model.

    The next run of this process may want another backend.
    """
    before = {name: os.environ.get(name) for name in _VARIABLES}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
