"""Whole programs whose models are built of Transformer Engine's modules."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader

from tests.helpers.launch import TRAIN, command, run
from tests.helpers.shared import made_once, session_folder
from tests.helpers.tiny_run import make_digits, read_metrics, tiny_values, write_config


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(session_folder(tmp_path_factory) / "te-digits", make_digits)


@pytest.mark.distributed
def test_upcycle_and_train(digits: Path, tmp_path: Path) -> None:
    """Two ranks with an expert each, from a dense run; both also with local modules."""
    dense = tiny_values(digits, tmp_path / "dense", "dense")
    dense["train"] |= {"steps": 1, "transformer_impl": "transformer_engine"}
    run(command(TRAIN, [write_config(tmp_path / "dense.yaml", dense)]), timeout=240).check()
    courses = {}
    for impl in ("transformer_engine", "local"):
        values = tiny_values(digits, tmp_path / impl)
        values["train"] |= {"steps": 2, "transformer_impl": impl}
        values["parallel"] = {"expert": 2}
        values["checkpoint"]["init_from"] = str(tmp_path / "dense")
        config = write_config(tmp_path / f"{impl}.yaml", values)
        run(command(TRAIN, [config], processes=2), timeout=240).check()
        courses[impl] = read_metrics(tmp_path / impl)
        last = tmp_path / impl / "checkpoints" / "step_0000002"
        names = FileSystemReader(last).read_metadata().state_dict_metadata
        # Local norms have none.
        has_state = any("layernorm._extra_state" in name for name in names)
        assert has_state == (impl == "transformer_engine")
    ours, theirs = courses["local"], courses["transformer_engine"]
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("lm_loss", "grad_norm", "aux_vision", "aux_text"):
            assert other[key] == pytest.approx(mine[key], rel=1e-4), (mine["step"], key)
