from __future__ import annotations

from pathlib import Path

import pytest

from moiie_megatron.evaluation.benchmarks.catalogue import chosen
from moiie_megatron.evaluation.benchmarks.data_sets import (
    DataPlaces,
    cache_name,
)
from moiie_megatron.evaluation.benchmarks.preflight import preflight, startable
from tests.unit.evaluation.benchmarks.stand_in import evaluation


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.touch()


@pytest.mark.parametrize(
    ("name", "directory"),
    [
        ("lmms-lab-encoder/POPE", "lmms-lab-encoder___pope"),
        ("lmms-lab-encoder/VQAv2", "lmms-lab-encoder___vq_av2"),
        ("lmms-lab-encoder/MMBench", "lmms-lab-encoder___mm_bench"),
        ("lmms-lab-encoder/ai2d", "lmms-lab-encoder___ai2d"),
        ("squad", "squad"),
    ],
)
def test_names_in_the_cache(name: str, directory: str) -> None:
    assert cache_name(name) == directory


def test_variables_of_the_libraries() -> None:
    places = DataPlaces.from_environment({"HF_HOME": "/h", "HF_HUB_OFFLINE": "yes"}, "/data")
    assert places == DataPlaces(Path("/data"), Path("/h/datasets"), offline=True)
    places = DataPlaces.from_environment(
        {"HF_HOME": "/h", "HF_DATASETS_CACHE": "/c", "HF_DATASETS_OFFLINE": "0"}, None
    )
    assert places == DataPlaces(Path.cwd(), Path("/c"), offline=False)


def test_gqa_needs_both_of_its_configurations(tmp_path: Path) -> None:
    places = DataPlaces(tmp_path / "data", tmp_path / "cache", offline=True)
    (gqa,) = chosen(["gqa"], [])
    cached = tmp_path / "cache" / "lmms-lab-encoder___gqa"
    touch(cached / "testdev_balanced_instructions" / "0.0.0" / "abc" / "gqa-testdev.arrow")
    assert [data.config for data in places.missing(gqa)] == ["testdev_balanced_images"]
    touch(cached / "testdev_balanced_images" / "0.0.0" / "abc" / "gqa-testdev.arrow")
    assert places.missing(gqa) == []


def test_a_directory_comes_before_the_cache_and_must_hold_files(tmp_path: Path) -> None:
    places = DataPlaces(tmp_path, tmp_path / "cache", offline=False)
    (pope,) = chosen(["pope"], [])
    (tmp_path / "lmms-lab-encoder" / "POPE").mkdir(parents=True)
    assert places.find(pope.data[0]) is None
    touch(tmp_path / "cache/lmms-lab-encoder___pope/default/0.0.0/abc/pope-test.arrow")
    assert places.find(pope.data[0]) == tmp_path / "cache/lmms-lab-encoder___pope"
    touch(tmp_path / "lmms-lab-encoder/POPE/data/test-00000-of-00001.parquet")
    assert places.find(pope.data[0]) == tmp_path / "lmms-lab-encoder/POPE"


def test_local_data_have_a_cache_of_their_own(tmp_path: Path) -> None:
    (pope,) = chosen(["pope"], [])
    places = DataPlaces(tmp_path, tmp_path / "cache", offline=False)
    assert places.variables(pope) == {}
    file = tmp_path / "lmms-lab-encoder/POPE/data/test-00000-of-00001.parquet"
    touch(file)
    found = places.variables(pope)
    assert found["HF_DATASETS_CACHE"].startswith(f"{tmp_path}/cache/local-")
    assert found == places.variables(pope)
    file.write_text("newer")
    assert places.variables(pope) != found
    offline = DataPlaces(tmp_path / "other", tmp_path, offline=True)
    assert offline.variables(pope) == {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def test_what_is_said_before_the_start(tmp_path: Path) -> None:
    touch(tmp_path / "lmms-lab-encoder/POPE/data/test-00000-of-00001.parquet")
    benchmarks = chosen(["pope", "mmvet", "hallusionbench", "vqav2-test"], [])
    job = evaluation(tmp_path)
    text = "\n".join(preflight(benchmarks, job))
    assert f"POPE            data in {tmp_path}/lmms-lab-encoder/POPE\n" in text
    assert "no data, lmms-lab-encoder/MMVet: will be downloaded; needs a judge (" in text
    assert "needs a judge that has a model named gpt-4" in text
    assert "writes a file for https://eval.ai/" in text
    assert f"--local-dir {tmp_path}/NAME" in text
    assert "--judge-url URL" in text
    assert startable(benchmarks, job) == benchmarks
