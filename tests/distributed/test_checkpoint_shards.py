"""Every rank writes its own part of a checkpoint, and ranks of any layout read it, bit for bit."""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.checkpoints import plain_tensors
from tests.helpers.launch import ROOT, command, run
from tests.helpers.shared import made_once, session_folder
from tests.helpers.tiny_run import tiny_values, write_config

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

# Virtual stages of different sizes; the second and the third one have experts.
STAGES = ["parallel.virtual_pipeline=2", "parallel.pipeline_layers=[1, 1, 2, 1]"]
LAYOUTS = {
    "tp2ep2": ["parallel.tensor=2", "parallel.expert=2"],
    "pp2ep2": ["parallel.pipeline=2", "parallel.expert=2", *STAGES],
    "tp2etp2": ["parallel.tensor=2", "parallel.expert_tensor=2"],
    "dp4": [],
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory per layout, each written from the one before."""

    def make(folder: Path) -> None:
        values = tiny_values(folder / "digits", folder / "run")
        values["language"]["num_layers"] = 5
        values["train"]["precision"] = "bf16"  # fp32 copies of the weights, as on GPUs
        config = write_config(folder / "run.yaml", values)
        words = [f"{name}={json.dumps(overrides)}" for name, overrides in LAYOUTS.items()]
        worker = command("tests/distributed/checkpoint_worker.py", [folder, config, *words], 4)
        run(worker, 500).check()

    return made_once(session_folder(tmp_path_factory) / "checkpoint_shards", make)


def bytes_by_rank(checkpoint: Path) -> Counter[int]:
    """Bytes of tensors that each rank wrote, by the names of its files."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    written: Counter[int] = Counter()
    for index, place in metadata.storage_data.items():
        entry = metadata.state_dict_metadata[index.fqn]
        chunks = [c for c in getattr(entry, "chunks", ()) if c.offsets == index.offset]
        for chunk in chunks:
            rank = int(re.fullmatch(r"__(\d+)_\d+\.distcp", place.relative_path)[1])
            written[rank] += chunk.sizes.numel() * entry.properties.dtype.itemsize
    return written


def test_values_survive_every_layout(checkpoints: Path) -> None:
    first, *others = LAYOUTS
    expected = plain_tensors(checkpoints / first)
    moments = [name for name in expected if name.startswith("optimizer.state.exp_avg.")]
    assert len(moments) > 50 and any("experts" in name for name in moments)
    assert all(expected[name].any() for name in moments)
    for layout in others:
        found = plain_tensors(checkpoints / layout)
        assert found.keys() == expected.keys()
        different = [name for name in found if not torch.equal(found[name], expected[name])]
        assert different == [], layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_writes_about_as_much(layout: str, checkpoints: Path) -> None:
    written = bytes_by_rank(checkpoints / layout)
    assert sorted(written) == [0, 1, 2, 3]
    total = sum(tensor.nbytes for tensor in plain_tensors(checkpoints / layout).values())
    assert written.total() == total
    # Stages of a pipeline hold different parts of the model, and this one is small.
    limit = 1.4 if "pp2" in layout else 1.1
    assert max(written.values()) <= limit * total / 4


def plans(config: Path, overrides: list[str], worlds: list[int]) -> list[dict[str, Any]]:
    """What ``benchmarks/checkpoint_plan.py`` prints, one entry for each number of ranks."""
    words = [config, *overrides, "--json", "--world", *map(str, worlds)]
    outcome = run(command("benchmarks/checkpoint_plan.py", words), timeout=200)
    outcome.check()
    return [json.loads(line) for line in outcome.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plan_is_what_the_ranks_write(layout: str, checkpoints: Path) -> None:
    (plan,) = plans(checkpoints / "run.yaml", LAYOUTS[layout], [4])
    written = bytes_by_rank(checkpoints / layout)
    assert plan["written"] == [written[rank] for rank in range(4)]


def test_plan_of_the_full_size() -> None:
    """LLaMA-3-8B, stage 2: ranks write as much as each other, and copy one tensor at a time."""
    found = plans(ROOT / "examples/configs/llama3-stage2.yaml", [], [8, 16, 64])
    assert [len(plan["written"]) for plan in found] == [8, 16, 64]
    # bf16 weights, and fp32 weights and two moments of the 16.9 billion parameters that train.
    assert {round(sum(plan["written"]) / 1e9) for plan in found} == {237}
    for plan in found:
        assert max(plan["written"]) <= 1.1 * sum(plan["written"]) / plan["world"]
        assert max(plan["largest"]) < 8e9 < min(plan["gathered"])
        assert max(plan["read"]) <= 1.4 * max(plan["written"])
