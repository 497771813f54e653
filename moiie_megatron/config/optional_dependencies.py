"""Packages that only some runs need, checked before a run starts."""

from __future__ import annotations

import importlib.util

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.utils.errors import UserError


def check_extras(config: RunConfig) -> None:
    """Refuse a run whose configuration needs a package that is not installed.

    Raises:
        UserError: The first missing package, with the key that needs it.
    """
    if (
        config.moe_layers
        and config.moe.dispatcher == "flex"
        and importlib.util.find_spec("deep_ep") is None
    ):
        raise UserError(
            "moe.dispatcher is flex, which needs the package deep_ep, and it is not installed: "
            "install it or use moiie, alltoall or allgather."
        )
    if config.log.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"log.wandb_project is {config.log.wandb_project!r} but the package wandb is not "
            'installed: pip install "moiie-megatron[wandb]", or leave the key out.'
        )
