"""Options: which checks run, on which device; mistakes are told before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.selftest.catalogue import CHECKS
from moiie_megatron.selftest.check import NEEDS
from moiie_megatron.selftest.main import list_checks, run_selftest, select
from moiie_megatron.utils.errors import UserError


def names(only: list[str] | None) -> list[str]:
    return [check.name for check in select(only)]


def test_process_groups_come_with_what_needs_them() -> None:
    assert names(None) == [check.name for check in CHECKS]
    assert names(["versions"]) == ["versions"]
    assert names(["layer", "versions"]) == ["versions", "process-groups", "layer"]


def test_every_check_says_what_to_do() -> None:
    assert len(names(None)) == len(set(names(None))) == len(list_checks().splitlines())
    for check in CHECKS:
        assert check.about and check.remedy and set(check.needs) <= set(NEEDS)
    assert sum(check.limit for check in CHECKS) < 60 * 60


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"only": ["layer", "speed"]}, "--only speed: there is no such check, but versions, "),
        ({"device": "cuda"}, "--device is cuda, but torch .* sees no GPU: "),
        ({"device": "cpu", "json_file": Path("/no/such/r.json")}, "/no/such is not a directory: "),
        ({"device": "cpu", "directory": Path("/no/such")}, "/no/such is not a directory: "),
    ],
)
def test_mistakes(options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=said):
        run_selftest(DistEnv(), **options)


def test_a_build_for_gpus_that_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match="--device is auto, but torch .* sees no GPU: "):
        run_selftest(DistEnv(), device="auto")
