"""The same answers in every parallel layout, and those of the export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moiie_megatron.checkpoint.directory import find_checkpoint
from moiie_megatron.generation.answer_requests import answer_requests
from moiie_megatron.generation.checkpoint_config import checkpoint_config
from moiie_megatron.generation.generator import Generator
from moiie_megatron.generation.requests import read_requests
from moiie_megatron.generation.sampling import GREEDY
from moiie_megatron.generation.token_generator import TokenGenerator
from moiie_megatron.mcore.parallel import ParallelContext
from tests.distributed.generation_worker import CASES, DRAWN, config_of
from tests.helpers import generation
from tests.helpers.generation import NEW_TOKENS
from tests.helpers.launch import command, run
from tests.helpers.shared import made_once, session_folder

# The time limit counts the worker, which the first test of a session waits for.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

WORKER = "tests/distributed/generation_worker.py"
NAMES = [(processes, name) for processes, cases in CASES.items() for name in cases]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        for processes in CASES:
            words = command(
                "tests/distributed/generation_worker.py", [folder, processes], processes
            )
            run(words, timeout=300).check()

    return made_once(session_folder(tmp_path_factory) / "generation", make)


@pytest.mark.parametrize(("processes", "name"), NAMES, ids=[name for _, name in NAMES])
def test_answers_are_the_exports_on_every_rank(
    processes: int, name: str, folder: Path, context: ParallelContext, tmp_path: Path
) -> None:
    config = config_of(processes, name)
    hf_model, prompts = generation.exported(config, tmp_path), generation.prompts(config)
    expected = [generation.exported_answer(config, hf_model, prompt)[0] for prompt in prompts]
    ranks: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text())
    assert len(ranks) == processes

    one_process = config.model_copy(update={"parallel": type(config.parallel)()})
    model = generation.model(one_process, context)
    alone = TokenGenerator(one_process, context, model, config.language.vocab_size)
    drawn = alone.generate(prompts, NEW_TOKENS, sampling=DRAWN)
    stops = {expected[0][2], expected[1][3]}
    stopped = alone.generate(prompts, NEW_TOKENS, stop_ids=stops)
    logits = alone.next_token_logits(prompts, expected)
    assert drawn != expected != stopped
    for rank in ranks:
        assert rank["greedy"] == expected
        assert rank["first alone"] == [expected[0][:2]]
        assert rank["drawn"] == drawn
        assert rank["stopped"] == stopped
        # Layouts add the same fp32 numbers in another order.
        torch.testing.assert_close(torch.tensor(rank["logits"]), logits, atol=2e-4, rtol=1e-4)


def test_records_on_a_pipeline(
    single: Path, digits: Path, context: ParallelContext, tmp_path: Path
) -> None:
    """The tool; what it writes, and what it goes on from."""
    images, checkpoint = digits / "data" / "images", find_checkpoint(single / "moiie")
    lines = (digits / "data" / "test.jsonl").read_text().splitlines()[:5]
    records = tmp_path / "records.jsonl"
    records.write_text("\n".join([*lines[:2], "{", *lines[2:]]))
    arguments = ["--records", records, "--images", images, "--max-new-tokens", "4"]
    out = tmp_path / "out.jsonl"
    words = [checkpoint, *arguments, "--out", out, "--batch-size", "4", "parallel.pipeline=2"]
    finished = run(command("tools/generate.py", words, 2), timeout=200)
    finished.check()
    assert "5 answers, 1 errors" in finished.stdout

    generator = Generator.load(checkpoint, checkpoint_config(checkpoint), context)
    expected = [
        result
        for batch in answer_requests(
            generator,
            read_requests(records),
            images,
            batch_size=6,
            max_new_tokens=4,
            sampling=GREEDY,
        )
        for result in batch
    ]
    assert [json.loads(line) for line in out.read_text().splitlines()] == expected
    assert [path.name for path in tmp_path.glob("out*")] == ["out.jsonl"]


# With LongRoPE rows begin anew, which test_token_generator.py counts.
ONCE = [(processes, name) for processes, name in NAMES if "longrope" not in name]


@pytest.mark.parametrize(("processes", "name"), ONCE, ids=[name for _, name in ONCE])
def test_every_rank_computes_its_part_of_the_tokens_once(
    processes: int, name: str, folder: Path
) -> None:
    """The prompts, then a token of each, filled up to equal parts for sequence parallelism."""
    config = config_of(processes, name)
    lengths = [len(prompt.tokens) for prompt in generation.prompts(config)]
    parallel = config.parallel
    replicas = processes // (parallel.tensor * parallel.pipeline)
    parts = parallel.tensor if parallel.sequence_parallel else 1
    most = max(sum(lengths[r::replicas]) for r in range(replicas))
    rows = -(-len(lengths) // replicas)
    expected = [-(-most // parts)] + [-(-rows // parts)] * (NEW_TOKENS - 1)
    ranks: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text())
    assert [rank["counts"] for rank in ranks] == [expected] * processes
