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

import pytest

from moiie_megatron.planning.samples.data_report import read_report
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
    assert_user_error(finished, "8 of 135 records (5.93%)", "1.00%", "--max-skipped-fraction")
    assert len(finished.stderr.splitlines()) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    good, broken = report["sources"]
    assert (report["samples"], report["skipped"]) == (135, 8)
    assert (good["samples"], good["skipped"], good["name"]) == (71, 0, "train.jsonl")
    assert (broken["samples"], broken["skipped"], broken["name"]) == (64, 8, "broken")
    assert [sample["index"] for sample in broken["skipped_samples"]] == sorted(damaged.damage)
    for sample in broken["skipped_samples"]:
        assert DAMAGES[damaged.damage[sample["index"]]] in sample["reason"]
        assert f"{damaged.records}[{sample['index']}]: " in finished.stdout
    assert good["lengths"]["max"] <= 160 and good["lengths"]["beyond_sequence_length"] == 0
    assert good["rows"]["packed"] < good["rows"]["one_sample_each"] == 71
    assert "broken" in finished.stdout and "train.jsonl" in finished.stdout
    assert f"71 samples into {good['rows']['packed']} rows of 160 tokens" in finished.stdout
    # Overrides may stand anywhere.
    allowed = prepare("validate", config, "--workers", "1", "data.max_skipped_fraction=0.1")
    assert allowed.code == 0 and allowed.stderr == ""
    assert not (tmp_path / "run").exists()


def test_validate_records_alone(damaged: DamagedData, tmp_path: Path) -> None:
    words = ("--records", damaged.records, "--images", damaged.images)
    finished = prepare("validate", *words, "--max-skipped-fraction", "0.5", "--skip-images")
    assert finished.code == 0 and "records.jsonl" in finished.stdout
    both = prepare("validate", "run.yaml", *words)
    assert_user_error(both, "run.yaml", "--records", "--images")
    for fraction in ("nan", "5", "-1", "x"):
        refused = prepare("validate", *words, "--max-skipped-fraction", fraction)
        assert refused.code == 2 and "--max-skipped-fraction" in refused.stderr
        assert repr(fraction) in refused.stderr
    assert_user_error(prepare("validate", "--records", damaged.records), "--records", "--images")


def test_lengths_of_records_alone(digits: Path, tmp_path: Path) -> None:
    data = digits / "data"
    words = ("--records", data / "train.jsonl", "--images", data / "images", "--skip-images")
    text = ("--tokenizer", data / "tokenizer.model", "--template", "phi3")
    sizes = ("--image-tokens", "16", "--sequence-length", "160")
    before = sorted(data.iterdir())
    report = tmp_path / "report.json"
    finished = prepare("validate", *words, *text, *sizes, "--json", report).check()
    (source,) = json.loads(report.read_text())["sources"]
    assert 0 < source["lengths"]["min"] < source["lengths"]["max"] <= 160
    packed = source["rows"]["packed"]
    assert f"71 samples into {packed} rows of 160 tokens" in finished.stdout
    assert "moe.image_fraction=" in finished.stdout
    (planned,) = read_report(report).sources
    assert planned.samples.sum() == 71 and planned.tokens.sum() == source["lengths"]["total"]
    assert sorted(data.iterdir()) == before  # nothing is written beside the records
    unwritable = tmp_path / "none" / "report.json"
    assert_user_error(prepare("validate", *words, "--json", unwritable), "--json", unwritable)


def test_clean_writes_what_can_be_used(damaged: DamagedData, tmp_path: Path) -> None:
    out = tmp_path / "clean.jsonl"
    source = ("--records", damaged.records, "--images", damaged.images)
    cleaned = prepare("clean", *source, "--out", out, "--workers", 1).check()
    assert "56 of 64 records" in cleaned.stdout and "and 8 more" not in cleaned.stdout
    kept = [json.loads(line)["id"] for line in out.read_text().splitlines()]
    assert set(kept) == damaged.good_ids and len(kept) == 56
    again = prepare("validate", "--records", out, "--images", damaged.images, "--workers", 1)
    assert "skipped" in again.check().stdout  # none is too many: the exit code is 0
    assert_user_error(prepare("clean", *source, "--out", out), "exists")
    nothing = tmp_path / "nothing.jsonl"
    nothing.write_text("{}\n")
    where = ("--images", damaged.images, "--out", tmp_path / "new.jsonl", "--workers", 1)
    assert_user_error(prepare("clean", "--records", nothing, *where), "None of the 1 records")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean.jsonl", "nothing.jsonl"]


def test_what_is_not_read_of_records(digits: Path, tmp_path: Path) -> None:
    record = json.loads((digits / "data" / "train.jsonl").read_text().splitlines()[0])
    records = [{**record, "width": 5, "mask": None}, {**record, "width": 6}, record]
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in records))
    source = ("--records", file, "--images", digits / "data" / "images", "--workers", 1)
    stdout = prepare("validate", *source, "--json", tmp_path / "report.json").check().stdout
    found = "key 'width' is not read (2), key 'mask' is not read (1)"
    assert f"some.jsonl: {found}" in stdout
    (summary,) = json.loads((tmp_path / "report.json").read_text())["sources"]
    assert list(summary["notes"].values()) == [2, 1]


def test_images_behind_a_link(digits: Path, tmp_path: Path) -> None:
    """LLaVA's usual layout links to the directories of other data sets."""
    record = json.loads((digits / "data" / "train.jsonl").read_text().splitlines()[0])
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "coco").symlink_to(digits / "data" / "images")
    file = tmp_path / "linked.jsonl"
    file.write_text(json.dumps({**record, "image": f"coco/{record['image']}"}) + "\n")
    source = ("--records", file, "--images", tmp_path / "images", "--workers", 1)
    refused = prepare("validate", *source)
    assert "is a link out of" in refused.stdout and "data.allow_outside_images" in refused.stdout
    prepare("validate", *source, "--allow-outside-images").check()


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
    assert_user_error(refused, "5 of 64 records", "1.00%")
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
