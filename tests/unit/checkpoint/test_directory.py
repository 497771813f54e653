"""Where checkpoints lie."""

from __future__ import annotations

from pathlib import Path

from moiie_megatron.checkpoint.directory import find_checkpoint, step_directory, step_number
from tests.helpers.user_errors import user_error


def test_names() -> None:
    path = step_directory("runs/a", 30)
    assert path == Path("runs/a/checkpoints/step_0000030") and step_number(path) == 30
    assert step_number(path.with_name("step_0000030.writing")) is None


def test_find_checkpoint_in_runs_and_by_itself(tmp_path: Path) -> None:
    step = tmp_path / "checkpoints" / "step_0000003"
    step.mkdir(parents=True)
    (step / "run.yaml").touch()
    with user_error(tmp_path, "is no checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "latest").write_text("step_0000003\n")
    assert find_checkpoint(tmp_path) == find_checkpoint(step) == step
    (tmp_path / "checkpoints" / "latest").write_text("step_0000009\n")
    with user_error("latest", "step_0000009"):
        find_checkpoint(tmp_path)
