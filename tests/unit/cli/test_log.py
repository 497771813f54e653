"""What the operator sees."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from moiie_megatron.cli.log import PACKAGE, configure_logging

LOGGER = logging.getLogger(f"{PACKAGE}.training.loop")


@pytest.fixture(autouse=True)
def _package_logger() -> Iterator[None]:
    logger = logging.getLogger(PACKAGE)
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, level, logger.propagate = before
    logger.setLevel(level)


def test_rank_0_prints_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # as in programs with several runs
        configure_logging(rank=0)
    LOGGER.debug("details")
    LOGGER.info("step %d of %d", 1, 2)
    LOGGER.warning("skipped %s", "a.json[3]")
    assert capsys.readouterr() == ("step 1 of 2\nwarning: skipped a.json[3]\n", "")


def test_other_ranks_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(rank=1)
    LOGGER.warning("skipped")
    assert capsys.readouterr() == ("", "")
