"""The example scripts train, started in every way that they promise; their configurations fit."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moiie_megatron.config.load import load_config
from moiie_megatron.config.validate import check_config
from tests.helpers.launch import ROOT, python

EXAMPLES = ROOT / "examples"
# Python itself: one launch with every import in every process.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PATHS = ("LLM", "VISION", "STAGE1_RECORDS", "STAGE1_IMAGES", "STAGE2_RECORDS", "STAGE2_IMAGES")
TIMEOUT = 280


def _environment(**variables: str) -> dict[str, str]:
    """Ours without what a launcher or a user would have set."""
    unset = {*PATHS, "OUTPUT", "TP", "PP", "EP", "NNODES", "NODE_RANK", "NPROC_PER_NODE"}
    unset |= {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RDZV_ENDPOINT"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return {**kept, "PYTHON": python(), **variables}


def _run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=_environment(**variables),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def _metrics(output: Path, stage: str) -> list[dict[str, float]]:
    lines = (output / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("backbone", "launcher"),
    [
        ("llama3", ["bash"]),
        ("llama3", TORCHRUN),
        ("llama3", [*TORCHRUN, "--no-python"]),
        ("phi3", ["bash"]),
    ],
    ids=["llama3-bash", "llama3-torchrun", "llama3-torchrun-no-python", "phi3-bash"],
)
def test_both_stages_train(backbone: str, launcher: list[str], tmp_path: Path) -> None:
    script = EXAMPLES / f"pretrain_moiie_{backbone}.sh"

    result = _run([*launcher, str(script), "train.steps=2"], OUTPUT=str(tmp_path / "run"))

    assert result.returncode == 0, result.stderr[-3000:]
    stage1, stage2 = (_metrics(tmp_path / "run", stage) for stage in ("stage1", "stage2"))
    assert [line["step"] for line in stage1] == [line["step"] for line in stage2] == [1, 2]
    assert not any("aux" in key for key in stage1[-1])
    # Balanced use gives top_k; less cannot be.
    assert stage2[-1]["aux_text"] > 1.9
    assert stage1[0]["lr_connector"] == pytest.approx(1e-3)
    assert stage2[0]["lr_moe"] == pytest.approx(2e-5)
    assert stage2[0]["lr_vision"] == pytest.approx(2e-6)
    config = yaml.safe_load((tmp_path / "run/stage2/config.yaml").read_text())
    assert config["parallel"]["expert"] == 2
    assert config["language"]["family"] == backbone.replace("llama3", "llama")
    assert config["checkpoint"]["init_from"] == str(tmp_path / "run/stage1")
    assert result.stdout.count("2 process(es) on cpu") == 2


def test_incomplete_paths_are_one_sentence() -> None:
    script = EXAMPLES / "pretrain_moiie_llama3.sh"

    result = _run(["bash", str(script)], LLM="/weights", VISION="/weights", STAGE1_IMAGES="/images")

    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == (
        "error: STAGE1_RECORDS, STAGE2_RECORDS, STAGE2_IMAGES not set: "
        f"set all of {', '.join(PATHS)}, or none of them for a tiny model.\n"
    )


def test_several_nodes_need_an_address() -> None:
    result = _run(["bash", str(EXAMPLES / "pretrain_moiie_phi3.sh")], NNODES="2")

    assert result.returncode == 1
    assert "NNODES is 2 but RDZV_ENDPOINT is not set" in result.stderr


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("numbered", [True, False], ids=["NODE_RANK", "c10d"])
def test_two_nodes_find_each_other(numbered: bool, tmp_path: Path) -> None:
    """Two launchers, one process each; a dry run prints on rank 0 of the whole job only."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    nodes = [
        subprocess.Popen(
            ["bash", str(EXAMPLES / "pretrain_moiie_llama3.sh"), "--dry-run"],
            env=_environment(
                NNODES="2",
                NPROC_PER_NODE="1",
                RDZV_ENDPOINT=endpoint,
                OUTPUT=str(tmp_path / "run"),
                **({"NODE_RANK": str(node)} if numbered else {}),
            ),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    try:
        outputs = [node.communicate(timeout=TIMEOUT) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    printed = "".join(stdout for stdout, _ in outputs)
    assert printed.count("activated") == 2  # one table per stage


@pytest.mark.parametrize("world_size", [8, 16, 32])
@pytest.mark.parametrize("backbone", ["llama3", "phi3"])
def test_the_paper_s_values_fit_on_gpus(backbone: str, world_size: int) -> None:
    environ = {name: f"/{name.lower()}" for name in (*PATHS, "OUTPUT")}
    stage1, stage2 = (
        load_config(EXAMPLES / "configs" / f"{backbone}-stage{number}.yaml", environ=environ)
        for number in (1, 2)
    )
    for config in (stage1, stage2):
        check_config(config, world_size=world_size)
        assert config.vision.num_image_tokens == 729
        assert config.data.sequence_length == 4096
        assert config.data.tokenizer == "/llm"
        assert config.train.epochs == 1
        assert config.optimizer.warmup_ratio == 0.03
        assert config.optimizer.weight_decay == 0

    assert stage1.stage.learning_rates == {"connector": 1e-3}
    assert stage1.train.global_batch_size == 256
    assert (stage1.stage.template, stage1.stage.image_mode) == ("plain", "square")
    assert stage1.moe_layers == []
    assert (stage1.language.pretrained, stage1.vision.pretrained) == ("/llm", "/vision")

    assert stage2.stage.learning_rates == {
        "vision": 2e-6,
        "connector": 2e-5,
        "language": 2e-5,
        "moe": 2e-5,
    }
    assert stage2.train.global_batch_size == 128
    assert stage2.data.packing and not stage1.data.packing
    assert (stage2.stage.template, stage2.stage.image_mode) == (backbone, "pad")
    assert stage2.moe_layers == list(range(1, 32, 2))
    assert stage2.moe.layout.num_experts == 4
    assert stage2.moe.vision_aux_loss_coeff == stage2.moe.text_aux_loss_coeff == 0.001
    assert stage2.checkpoint.init_from == stage1.output == "/output/stage1"
