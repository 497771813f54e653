"""tools/prepare_data.py on good and on broken data."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.damaged_data import DAMAGES, DamagedData, write_damaged
from tests.helpers.launch import ROOT, Finished, command, run
from tests.helpers.tiny_run import tiny_values, write_config
from tests.helpers.user_errors import assert_user_error

TOOL = "tools/prepare_data.py"


def prepare(*words: str | Path) -> Finished:
    """The tool in this process: torch is imported once for all tests."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = [TOOL, *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / TOOL), run_name="__main__")
    except SystemExit as exit:
        return Finished(int(exit.code or 0), out.getvalue(), err.getvalue())
    finally:
        sys.argv = before
    raise AssertionError("the tool did not exit")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> DamagedData:
    return write_damaged(tmp_path_factory.mktemp("damaged") / "d", samples=64, bad=8)


def test_validate_a_run(digits: Path, damaged: DamagedData, tmp_path: Path) -> None:
    values = tiny_values(digits, tmp_path / "run")
    values["data"]["sources"] += [
        {"records": str(damaged.records), "images": str(damaged.images), "name": "broken"}
    ]
    config = write_config(tmp_path / "run.yaml", values)
    finished = prepare("validate", config, "--workers", "2", "--json", tmp_path / "report.json")
    assert_user_error(finished, "8 of 135", "5.93%", "1.00%")
    report = json.loads((tmp_path / "report.json").read_text())
    good, bad = report["sources"]
    assert (report["samples"], report["bad"]) == (135, 8)
    assert (good["samples"], good["bad"], good["name"]) == (71, 0, "train.jsonl")
    assert (bad["samples"], bad["bad"], bad["name"]) == (64, 8, "broken")
    assert [fault["index"] for fault in bad["faults"]] == sorted(damaged.damage)
    for fault in bad["faults"]:
        assert DAMAGES[damaged.damage[fault["index"]]] in fault["reason"]
        assert f"{damaged.records}[{fault['index']}]: " in finished.stdout
    assert good["lengths"]["max"] <= 160 and good["lengths"]["beyond_sequence_length"] == 0
    assert good["rows"]["packed"] < good["rows"]["one_sample_each"] == 71
    assert "broken" in finished.stdout and "train.jsonl" in finished.stdout
    # Overrides may stand anywhere.
    allowed = prepare("validate", config, "--workers", "1", "data.max_skipped_fraction=0.1")
    assert allowed.code == 0 and allowed.stderr == ""
    assert not (tmp_path / "run").exists()


def test_validate_records_alone(damaged: DamagedData, tmp_path: Path) -> None:
    words = ("--records", damaged.records, "--images", damaged.images)
    finished = prepare("validate", *words, "--max-skipped-fraction", "0.5", "--skip-images")
    assert finished.code == 0 and "records.jsonl" in finished.stdout
    both = prepare("validate", "run.yaml", *words)
    assert_user_error(both, "--records", "configuration")
    for share in ("nan", "5", "-1", "x"):
        refused = prepare("validate", *words, "--max-skipped-fraction", share)
        assert refused.code == 2 and repr(share) in refused.stderr and "0 to 1" in refused.stderr
    none = prepare("validate", "--records", damaged.records)
    assert_user_error(none, "--records", "--images")


def test_lengths(digits: Path, tmp_path: Path) -> None:
    data = digits / "data"
    words = ("--records", data / "train.jsonl", "--images", data / "images")
    text = ("--tokenizer", data / "tokenizer.model", "--template", "phi3")
    sizes = ("--image-tokens", "16", "--sequence-length", "160")
    finished = prepare(
        "lengths", *words, *text, *sizes, "--out", tmp_path, "--workers", "2"
    ).check()
    lengths = np.load(tmp_path / "train.jsonl.lengths.npy")
    assert lengths.dtype == np.int32 and len(lengths) == 71 and lengths.min() > 0
    described = json.loads((tmp_path / "train.jsonl.lengths.json").read_text())
    assert (described["template"], described["num_image_tokens"]) == ("phi3", 16)
    assert described["tokens"] == lengths.sum()
    assert "71 samples fill " in finished.stdout and "rows of 160 tokens" in finished.stdout
    other_folder = tmp_path / "other"
    other_folder.mkdir()
    values = tiny_values(digits, tmp_path / "run")
    other = {
        "records": str(shutil.copy(data / "train.jsonl", other_folder)),
        "images": str(data / "images"),
    }
    values["data"]["sources"].append(other)
    config = write_config(tmp_path / "run.yaml", values)
    refused = prepare("lengths", config, "--out", tmp_path)
    assert_user_error(refused, tmp_path)
    refused = prepare("lengths", *words, "--out", tmp_path)
    assert_user_error(refused, "--tokenizer")


def test_jsonl(digits: Path, tmp_path: Path) -> None:
    captions = digits / "data" / "captions.json"
    words = ("jsonl", captions, "--out", tmp_path / "c.jsonl")
    finished = run(command(TOOL, words), timeout=60).check()  # as a program of its own
    lines = (tmp_path / "c.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == json.loads(captions.read_text())
    assert f"c.jsonl: {len(lines)} records" in finished.stdout
    assert_user_error(prepare(*words), tmp_path / "c.jsonl")


def test_webdataset(damaged: DamagedData, digits: Path, tmp_path: Path) -> None:
    words = ("--records", damaged.records, "--images", damaged.images)
    refused = prepare("webdataset", *words, "--out", tmp_path / "wds")
    assert_user_error(refused, "cannot be used", "1.00%")
    assert list(tmp_path.iterdir()) == []
    data = digits / "data"
    words = ("--records", data / "train.jsonl", "--images", data / "images")
    out = tmp_path / "wds"
    finished = prepare("webdataset", *words, "--out", out, "--samples-per-shard", "50").check()
    assert "71 samples in 2 shard(s)" in finished.stdout
    assert sorted(p.name for p in out.glob("*.tar")) == ["shard_00000.tar", "shard_00001.tar"]
    assert "CrudeWebdataset" in (out / ".nv-meta" / "dataset.yaml").read_text()
    with tarfile.open(out / "shard_00001.tar") as tar:
        assert sum(name.endswith(".json") for name in tar.getnames()) == 21
    (tmp_path / "file").touch()
    impossible = prepare("webdataset", *words, "--out", tmp_path / "file" / "wds")
    assert_user_error(impossible, tmp_path / "file" / "wds", "cannot be made")
    again = prepare("webdataset", *words, "--out", out)
    assert_user_error(again, out, "exists")


def test_a_long_image_suffix(digits: Path, tmp_path: Path) -> None:
    """Longer than what the header of a tar file holds."""
    data = digits / "data"
    picture = next(file for file in (data / "images").rglob("*") if file.is_file())
    name = "photo." + "x" * 110
    shutil.copy(picture, tmp_path / name)
    turns = [{"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "b"}]
    record = {"id": "1", "image": name, "conversations": turns}
    (tmp_path / "r.jsonl").write_text(json.dumps(record) + "\n")
    words = ("--records", tmp_path / "r.jsonl", "--images", tmp_path)
    prepare("webdataset", *words, "--out", tmp_path / "wds").check()
    with tarfile.open(tmp_path / "wds" / "shard_00000.tar") as tar:
        assert tar.getnames() == ["000000000.json", "000000000.img"]
