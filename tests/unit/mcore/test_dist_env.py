"""What launchers leave in the environment."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest

from moiie_megatron.mcore.dist_env import DistEnv, connect_store, dist_env_from
from tests.helpers.user_errors import user_error

PAIR = {"RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, DistEnv()),
        ({"WORLD_SIZE": "1"}, DistEnv()),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, DistEnv()),
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "8"}, DistEnv()),
        (PAIR | {"LOCAL_RANK": "1", "SLURM_STEP_NUM_TASKS": "2"}, DistEnv(1, 2, 1)),
    ],
)
def test_what_is_understood(environ: dict[str, str], expected: DistEnv) -> None:
    assert dist_env_from(environ) == expected


@pytest.mark.parametrize(
    ("environ", "parts"),
    [
        ({"RANK": "0"}, ["RANK", "'0'", "WORLD_SIZE is not set"]),
        ({"RANK": "1"}, ["RANK", "'1'", "WORLD_SIZE is not set"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE", "'2'", "RANK is not set"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE", "0"]),
        ({"RANK": "0", "WORLD_SIZE": "0"}, ["RANK", "WORLD_SIZE is 0"]),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK is 2", "WORLD_SIZE is 2"]),
        (PAIR | {"RANK": "-1"}, ["RANK", "'-1'"]),
        (PAIR | {"RANK": ""}, ["RANK", "''"]),
        (PAIR | {"WORLD_SIZE": "two"}, ["WORLD_SIZE", "'two'"]),
        (PAIR | {"LOCAL_RANK": "1.0"}, ["LOCAL_RANK", "'1.0'"]),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, ["SLURM_STEP_NUM_TASKS is 8"]),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, ["OMPI_COMM_WORLD_SIZE is 4"]),
        ({"PMI_SIZE": "4"}, ["PMI_SIZE is 4"]),
    ],
)
def test_what_is_refused(environ: dict[str, str], parts: list[str]) -> None:
    with user_error(*parts, "torchrun"):
        dist_env_from(environ)


@pytest.mark.parametrize("port", ["abc", "0", "65536", "-1"])
def test_a_port_that_is_none(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", port)
    with user_error("MASTER_PORT", repr(port), "torchrun"):
        connect_store(DistEnv(0, 2))


def test_nobody_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", port)
    with user_error("2", f"localhost:{port}", "WORLD_SIZE", "torchrun"):
        connect_store(DistEnv(0, 2), timedelta(seconds=0.5))
