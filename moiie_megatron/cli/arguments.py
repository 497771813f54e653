"""Checks of numbers on command lines."""

from __future__ import annotations

import argparse

from moiie_megatron.utils.errors import UserError


def check_range(
    arguments: argparse.Namespace, name: str, lowest: float, highest: float | None = None
) -> None:
    """Refuse a number outside a range, and NaN; one that was not given may be None.

    Args:
        arguments: The command line.
        name: The option without dashes in front, with underscores inside.
        lowest: The smallest number that may be given.
        highest: The largest one; None for no limit.

    Raises:
        UserError: With the option, the value and the range.
    """
    value = getattr(arguments, name)
    if value is None or (lowest <= value and (highest is None or value <= highest)):
        return
    wanted = f"{lowest} or more" if highest is None else f"from {lowest} to {highest}"
    raise UserError(f"--{name.replace('_', '-')} is {value}: use {wanted}.")
