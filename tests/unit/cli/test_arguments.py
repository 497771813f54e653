"""Numbers on command lines."""

from __future__ import annotations

from argparse import Namespace

import pytest

from moiie_megatron.cli.arguments import check_range
from tests.helpers.user_errors import user_error


@pytest.mark.parametrize("value", [0, -3, float("nan"), 1 << 70])
def test_a_number_outside_its_range(value: float) -> None:
    with user_error("--max-new-tokens", value, "1 to 9"):
        check_range(Namespace(max_new_tokens=value), "max_new_tokens", 1, 9)


def test_numbers_inside_their_range() -> None:
    for value in (None, 1, 9, 1.5):
        check_range(Namespace(n=value), "n", 1, 9)
    check_range(Namespace(n=float("inf")), "n", 0)
