"""The mixtures of the paper: each is one value of ``data.sources``, checked on stand-in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from moiie_megatron.config.load import dump_config, load_config
from moiie_megatron.config.validate import check_paths
from moiie_megatron.data.stream.build import build_sources
from moiie_megatron.data.stream.order import Blend
from tests.helpers.user_errors import user_error
from tests.unit.config.minimal import load_minimal

CONFIGS = Path(__file__).resolve().parents[3] / "examples" / "configs"
MIXTURES = {path.stem: path for path in sorted((CONFIGS / "mixtures").glob("*.yaml"))}
SOURCES = {
    "bunny-pretrain-2m": 1,
    "mgm-1.3m": 1,
    "mgm-bunny-2m": 2,
    "mgm-bunny-llava-next-2.7m": 3,
    "llava-onevision-single-image": 81,
}


def test_all_mixtures_are_tested() -> None:
    assert set(MIXTURES) == set(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("backbone", ["llama3", "phi3"])
def test_a_mixture_replaces_the_sources_of_a_run(name: str, backbone: str, tmp_path: Path) -> None:
    stage = 1 if "pretrain" in name else 2
    environ = {"LLM": str(tmp_path), "VISION": str(tmp_path), "OUTPUT": str(tmp_path)}
    (tmp_path / "stage1").mkdir()
    config = load_config(
        CONFIGS / f"{backbone}-stage{stage}.yaml",
        [f"data.sources={MIXTURES[name]}", "data.num_workers=0"],
        environ | {"DATA": str(tmp_path / "data")},
    )
    names = [source.name for source in config.data.sources]
    assert len(names) == len(set(names)) == SOURCES[name]
    assert config.data.sequence_length == 4096  # the rest of the section is the run's
    turns = [{"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "b"}]
    for source in config.data.sources:
        Path(source.images, "x").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(Path(source.images, "x", "1.png"))
        records = [{"id": "1", "image": "x/1.png", "conversations": turns}] * 4
        lines = "".join(json.dumps(record) + "\n" for record in records)
        content = json.dumps(records) if source.records.endswith(".json") else lines
        Path(source.records).write_text(content)
    check_paths(config)
    for source in build_sources(config):
        assert source.images.load(source.records[3].images[0]).shape[0] == 3
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "resolved.yaml") == config


def test_the_publisher_s_shares() -> None:
    sources = yaml.safe_load(MIXTURES["llava-onevision-single-image"].read_text())
    weights = {source["name"]: source.get("weight", 1.0) for source in sources}
    assert weights["hme100k"] == 0.1 and weights["k12_printing"] == 0.01
    assert weights["aokvqa(cauldron,llava_format)"] == 1.0
    assert Blend.weighted([74502], [weights["hme100k"]]).counts == (7450,)


def test_what_is_no_list_of_sources(tmp_path: Path) -> None:
    file = tmp_path / "mixture.yaml"
    override = [f"data.sources={file}"]
    with user_error("data.sources", file, "does not exist"):
        load_minimal(tmp_path, override)
    file.write_text("sources: []")
    with user_error("data.sources", file, "list"):
        load_minimal(tmp_path, override)
    file.write_text("- {records: '${HERE}/a.json', images: b, weights: 2}")
    with user_error("data.sources.0.records", "variable HERE"):
        load_minimal(tmp_path, override)
    with user_error("data.sources.0.weights", "did you mean weight"):
        load_minimal(tmp_path, override, environ={"HERE": "/data"})
    file.write_text("- {records: a.json, images: b, weight: 0}")
    with user_error("data.sources.0.weight", "0", "above 0"):
        load_minimal(tmp_path, override)
    file.write_text("- {records: a.json, images: b, weight: 2.5, name: mine}")
    source = load_minimal(tmp_path, override).data.sources[0]
    assert (source.records, source.weight, source.name) == ("a.json", 2.5, "mine")
