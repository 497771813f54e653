"""A mistake of the user ends in one sentence with the value in it, and in no hang."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.launch import TRAIN, Finished, command, run, torchrun
from tests.helpers.shared import made_once, session_folder
from tests.helpers.tiny_run import tiny_values, write_config
from tests.helpers.user_errors import assert_one_error, assert_user_error

# What was wrong, as overrides of a good run, and words that the sentence must hold.  FOLDER is
# the folder of the bad files.
CASES: dict[str, tuple[list[str], list[str]]] = {
    "unknown_key": (["train.stepz=3"], ["train.stepz", "did you mean steps?"]),
    "wrong_type": (["train.steps=many"], ["train.steps", "'many'", "a whole number"]),
    "experts": (["parallel.expert=3"], ["parallel.expert is 3", "4 experts"]),
    "layers": (["parallel.pipeline=3"], ["parallel.pipeline is 3", "num_layers is 4"]),
    "heads": (["parallel.tensor=3"], ["parallel.tensor is 3", "num_attention_heads is 4"]),
    "top_k": (["moe.top_k=4"], ["moe.top_k is 4", "3 experts"]),
    "sequence": (["data.sequence_length=16"], ["data.sequence_length is 16", "16 tokens"]),
    "batch": (["train.micro_batch_size=3"], ["train.micro_batch_size is 3", "global_batch_size"]),
    "world": (["parallel.expert=2"], ["1 ranks", "parallel.expert is 2"]),
    "megatron_unknown": (["megatron.recompute_granularit=full"], ["did you mean recompute_gran"]),
    "megatron_owned": (["megatron.num_layers=2"], ["megatron.num_layers is 2", "language.num_l"]),
    "megatron_unsupported": (["megatron.mtp_num_layers=1"], ["mtp_num_layers is 1", "not support"]),
    "megatron_type": (["megatron.hidden_dropout=oops"], ["hidden_dropout", "oops"]),
    "megatron_device": (["megatron.attention_backend=flash"], ["attention_backend=flash", "cpu"]),
    "no_override": (["train.steps"], ["train.steps", "name a YAML file"]),
    "no_records": (["data.sources.0.records=x"], ["data.sources"]),
    "records": (["data.sources=[{records: FOLDER/no.jsonl, images: FOLDER}]"], ["FOLDER/no.jsonl"]),
    "images": (["data.sources=[{records: FOLDER/torn.json, images: FOLDER/no}]"], ["FOLDER/no"]),
    "torn_json": (["data.sources=[{records: FOLDER/torn.json, images: FOLDER}]"], ["torn.json"]),
    "tokenizer": (["data.tokenizer=FOLDER/no.model"], ["data.tokenizer", "FOLDER/no.model"]),
    "bad_tokenizer": (["data.tokenizer=FOLDER/bad.model"], ["FOLDER/bad.model"]),
    "init_from": (["checkpoint.init_from=FOLDER/no"], ["checkpoint.init_from", "FOLDER/no"]),
    "no_checkpoint": (["checkpoint.init_from=FOLDER/empty"], ["FOLDER/empty"]),
    "truncated": (["checkpoint.init_from=FOLDER/truncated"], ["FOLDER/truncated"]),
    "newer": (["checkpoint.init_from=FOLDER/newer"], ["format version 99"]),
    "other_sizes": (
        ["checkpoint.init_from=FOLDER/good", "language.ffn_hidden_size=256"],
        ["(256, 64)", "(512, 64)"],
    ),
    "output": (["output=FOLDER/torn.json/run"], ["FOLDER/torn.json/run", "cannot be written"]),
    "cuda": (["train.device=cuda"], ["train.device is cuda", "0 GPU(s)"]),
}


def damaged_files(folder: Path, checkpoint: Path) -> None:
    """Everything that CASES names, below ``folder``."""
    (folder / "torn.json").write_text('[{"id": "a", "conversations": [')
    (folder / "bad.model").write_bytes(b"this is no SentencePiece model")
    (folder / "empty").mkdir()
    for name in ("good", "truncated", "newer"):
        shutil.copytree(checkpoint, folder / name)
    largest = max((folder / "truncated").glob("*.distcp"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    common = folder / "newer" / "common.pt"
    state = torch.load(common, weights_only=False)
    torch.save({**state, "format_version": 99}, common)


@pytest.fixture(scope="session")
def bad(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A good run's file, and the damaged files."""

    def make(folder: Path) -> None:
        seed = tiny_values(digits, folder / "seed", "dense")
        seed["train"]["steps"] = 1
        run(command(TRAIN, [write_config(folder / "seed.yaml", seed)]), timeout=120).check()
        damaged_files(folder, folder / "seed" / "checkpoints" / "step_0000001")
        write_config(folder / "good.yaml", tiny_values(digits, folder / "run"))

    return made_once(session_folder(tmp_path_factory) / "bad", make)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_one_process(case: str, bad: Path, tmp_path: Path) -> None:
    overrides, words = CASES[case]
    replaced = [word.replace("FOLDER", str(bad)) for word in overrides]
    finished = run(command(TRAIN, [bad / "good.yaml", f"output={tmp_path}", *replaced]), timeout=60)
    if case == "cuda" and torch.cuda.is_available():
        finished.check()  # there the same run is a good one
        return
    assert_user_error(finished, *(word.replace("FOLDER", str(bad)) for word in words))
    assert "error: " not in finished.stdout


def two_processes(folder: Path, config: Path, *overrides: str) -> tuple[Finished, list[str]]:
    """The finished job, and what each process printed to stderr."""
    logs = folder / "logs"
    start = torchrun(2, f"--log-dir={logs}", "--tee=3")
    finished = run([*start, TRAIN, str(config), *overrides], timeout=100)
    files = sorted(logs.rglob("stderr.log"))
    assert len(files) == 2
    return finished, [file.read_text() for file in files]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.stepz=3"], ["train.stepz", "did you mean steps"]),
        (["parallel.tensor=4"], ["2 ranks", "parallel.tensor", "4"]),
        (["data.sources=[{records: BAD/torn.json, images: BAD}]"], ["BAD/torn.json"]),
        (["checkpoint.init_from=BAD/truncated", "parallel.expert=2"], ["BAD/truncated"]),
    ],
)
def test_two_processes(
    overrides: list[str], words: list[str], bad: Path, digits: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_values(digits, tmp_path / "run"))
    replaced = [word.replace("BAD", str(bad)) for word in overrides]
    finished, errors = two_processes(tmp_path, config, *replaced)
    assert finished.code != 0
    assert_one_error("\n".join(errors), *(word.replace("BAD", str(bad)) for word in words))
    # The user of torchrun sees it, too.
    shown = [line for line in finished.stderr.splitlines() if re.search(r"\]:error: ", line)]
    assert len(shown) == 1
    assert "exitcode  : 0 " not in finished.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_bad_data_on_one_rank_alone(digits: Path, tmp_path: Path) -> None:
    """Rank 1 gets only records whose image is missing, and stops; rank 0 waits in a collective."""
    values = tiny_values(digits, tmp_path / "run")
    values["train"] |= {"global_batch_size": 16, "micro_batch_size": 8, "steps": 50}
    lines = (digits / "data" / "train.jsonl").read_text().splitlines()[:16]
    from moiie_megatron.data.stream.order import SampleOrder

    order = SampleOrder(len(lines), seed=1234)
    records = [json.loads(line) for line in lines]
    for n in range(8, 16):  # the second micro-batch of the first step
        records[order.sample_at(n)]["image"] = "no.png"
        records[order.sample_at(n)]["conversations"][0]["value"] = "<image>\nWhat is it?"
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    values["data"]["sources"][0]["records"] = str(file)
    finished, errors = two_processes(
        tmp_path, write_config(tmp_path / "run.yaml", values), "data.max_skipped_fraction=0.2"
    )
    assert finished.code != 0
    assert_one_error("\n".join(errors), "data.max_skipped_fraction", "no.png")
