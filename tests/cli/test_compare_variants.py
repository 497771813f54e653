"""examples/compare_variants.sh, with a few steps: does it run, not: what does it show."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from moiie_megatron.config.load import load_config
from tests.helpers.launch import ROOT, environment, python
from tests.helpers.tiny_run import read_metrics

VARIANTS = ["dense", "vanilla", "modality", "moiie"]
SIZES = {"STEPS": "2", "START_STEPS": "2", "PICTURES": "32", "QUESTIONS": "4"}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_four_variants_with_one_budget(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *("bash", "examples/compare_variants.sh"),
            *("train.global_batch_size=8", "train.micro_batch_size=4"),
        ],
        env={**environment(), "PYTHON": python(), "OUTPUT": str(tmp_path), **SIZES},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=560,
    )

    assert result.returncode == 0, result.stderr[-4000:]
    table = result.stdout.splitlines()[-6:-1]
    assert table[0].split() == [
        *("accuracy", "blanked", "loss", "activated", "total", "tokens/s"),
    ]
    assert [line.split("  ")[0] for line in table[1:]] == [
        *("Dense", "Vanilla MoE", "Modality MoE", "MoIIE"),
    ]
    assert (tmp_path / "comparison.png").is_file()
    values = json.loads((tmp_path / "comparison.json").read_text())
    assert list(values) == VARIANTS
    dense, *experts = (values[variant][0] for variant in VARIANTS)
    # Routers differ by some rows.
    assert [e["total"] for e in experts] == pytest.approx([experts[0]["total"]] * 3, rel=1e-3)
    assert dense["total"] < dense["total"] * 1.5 < experts[0]["total"]

    # The same start, samples and schedule: the first loss is the same, and so is every rate.
    steps = {variant: read_metrics(tmp_path / f"{variant}-3") for variant in VARIANTS}
    for variant in VARIANTS[1:]:
        first, same = steps[variant][0], steps["dense"][0]
        assert first["lm_loss"] == pytest.approx(same["lm_loss"], rel=1e-5)
        for key in ("tokens", "label_tokens", "lr_language", "lr_vision", "lr_connector"):
            assert [s[key] for s in steps[variant]] == [s[key] for s in steps["dense"]], key
        config = load_config(tmp_path / f"{variant}-3" / "config.yaml", environ={})
        assert config.parallel.expert == 2
        assert config.checkpoint.init_from == str(tmp_path / "stage1")
