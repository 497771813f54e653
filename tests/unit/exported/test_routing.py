"""Counts of the experts that tokens take, against the router scores that the model returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moiie_megatron.analysis.routing.plots import plot_routing
from moiie_megatron.exported.model import ExportedModel
from moiie_megatron.exported.routing import RoutingRecorder
from moiie_megatron.exported.token_routing import TokenRoutingRecorder
from moiie_megatron.routing_stats.reading import read_routing
from tests.helpers.tiny_export import IMAGE_TOKENS, ask, picture, write_export
from tests.helpers.user_errors import user_error

CONVERSATIONS = [
    ask("Hi?"),
    ask("What is it, and why?", picture(0)),
    ask("B", *map(picture, (1, 2))),
]
NEW = 8


def _counts(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens and loads by phase, layer and modality."""
    return {
        (record["phase"], layer, modality): (part["tokens"], part["load"])
        for record in records
        for layer, parts in record["layers"].items()
        for modality, part in ((m, parts[m]) for m in ("vision", "text"))
    }


def _added(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        key: (
            sum(run[key][0] for run in runs),
            torch.tensor([run[key][1] for run in runs]).sum(dim=0).tolist(),
        )
        for key in runs[0]
    }


@torch.no_grad()
def _by_hand(model: ExportedModel, conversation: Any) -> tuple[dict[str, Any], list[int]]:
    """From the scores of one pass over prompt and answer, without a cache."""
    prompt = dict(model.encode(conversation))
    (answer,) = model.generate([prompt], max_new_tokens=NEW)
    length = prompt["input_ids"].shape[1]
    read = torch.tensor([answer if len(answer) < NEW else answer[:-1]], dtype=torch.int64)
    prompt["input_ids"] = torch.cat([prompt["input_ids"], read], dim=1)
    types = torch.cat([prompt["mm_token_type_ids"], torch.zeros_like(read)], dim=1)
    prompt["mm_token_type_ids"] = types
    scores = model.model(**prompt, output_router_logits=True).router_logits
    counts = {}
    for layer, score_TE in zip((1, 3), scores, strict=True):
        chosen = score_TE.topk(2, dim=-1).indices
        for phase, rows in (("prompt", slice(0, length)), ("answer", slice(length, None))):
            for modality, kind in (("vision", 1), ("text", 0)):
                ids = chosen[rows][types[0, rows] == kind]
                load = torch.bincount(ids.flatten(), minlength=4).tolist()
                counts[phase, str(layer), modality] = (len(ids), load)
    return counts, answer


def test_counts_are_those_of_the_router_scores(model: ExportedModel) -> None:
    alone = []
    for conversation in CONVERSATIONS:
        want, answer = _by_hand(model, conversation)
        with RoutingRecorder(model.model) as recorder:
            model.answer([conversation], max_new_tokens=NEW)
        assert _counts(recorder.records()) == want
        text = want["answer", "1", "text"][0]
        assert text == (len(answer) if len(answer) < NEW else NEW - 1) > 0
        alone.append(want)
    assert alone[2]["prompt", "3", "vision"][0] == 2 * IMAGE_TOKENS
    # In a batch with padding, and rows that go on with it behind their end.
    with RoutingRecorder(model.model) as recorder:
        model.answer(CONVERSATIONS, max_new_tokens=NEW)
    assert _counts(recorder.records()) == _added(alone)
    model.answer(CONVERSATIONS)  # outside the block
    assert recorder.records()[0]["samples"] == len(CONVERSATIONS)


def test_rows_that_end_early_count_up_to_their_end(export: Path) -> None:
    model = ExportedModel.load(export, device="cpu")
    first = model.generate([model.encode(CONVERSATIONS[0])], max_new_tokens=NEW)[0]
    ends = model.model.generation_config.eos_token_id
    model.model.generation_config.eos_token_id = [*(ends if isinstance(ends, list) else [ends])]
    model.model.generation_config.eos_token_id.append(first[3])
    want = [_by_hand(model, conversation) for conversation in CONVERSATIONS]
    lengths = [len(answer) for _, answer in want]
    assert min(lengths) < max(lengths)
    with RoutingRecorder(model.model) as recorder:
        model.answer(CONVERSATIONS, max_new_tokens=NEW)
    assert _counts(recorder.records()) == _added([counts for counts, _ in want])


def test_a_file_that_readers_and_plots_take(model: ExportedModel, tmp_path: Path) -> None:
    file = tmp_path / "new" / "routing.jsonl"
    with RoutingRecorder(model.model) as recorder:
        model.answer(CONVERSATIONS[:2], max_new_tokens=NEW)
    recorder.save(file, benchmark="digits")
    records = read_routing(file)
    assert records == recorder.records(benchmark="digits")
    assert [record["phase"] for record in records] == ["prompt", "answer"]
    for part in (records[0]["layers"]["1"][m] for m in ("vision", "text")):
        assert sum(part["load"]) == 2 * part["tokens"]
        assert sum(part["prob"]) == pytest.approx(1, abs=1e-6)
    assert [p.name for p in plot_routing(records, tmp_path)] == ["pathways.png", "groups.png"]
    # A second process goes on from the file.
    with RoutingRecorder(model.model) as again:
        again.add_saved(file)
        model.answer(CONVERSATIONS[2:], max_new_tokens=NEW)
    with RoutingRecorder(model.model) as whole:
        for conversation in CONVERSATIONS:
            model.answer([conversation], max_new_tokens=NEW)
    assert _counts(again.records()) == _counts(whole.records())
    for one, other in zip(again.records(), whole.records(), strict=True):
        assert one["samples"] == other["samples"] == 3
        for modality in ("vision", "text"):
            parts = [record["layers"]["3"][modality]["prob"] for record in (one, other)]
            assert parts[0] == pytest.approx(parts[1], abs=1e-7)


def test_models_and_files_that_cannot_be_counted(
    export: Path, model: ExportedModel, tmp_path: Path
) -> None:
    alone = ExportedModel.load(export, device="cpu", expert="text")
    with user_error("load the export again"):
        RoutingRecorder(alone.model)
    vanilla = write_export(tmp_path / "vanilla", variant="vanilla")
    file = tmp_path / "routing.jsonl"
    RoutingRecorder(ExportedModel.load(vanilla, device="cpu").model).save(file)
    with user_error(file, "delete it"):
        RoutingRecorder(model.model).add_saved(file)
    RoutingRecorder(model.model).save(file)
    record = json.loads(file.read_text().splitlines()[0])
    file.write_text(json.dumps({**record, "phase": "training"}) + "\n")
    with user_error(file, "delete it"):
        RoutingRecorder(model.model).add_saved(file)
    (tmp_path / "file").touch()
    with user_error(tmp_path / "file" / "routing.jsonl"):
        RoutingRecorder(model.model).save(tmp_path / "file" / "routing.jsonl")


def test_single_tokens_of_a_stream(model: ExportedModel) -> None:
    conversation = CONVERSATIONS[1]
    prompt = model.encode(conversation)
    (answer,) = model.generate([prompt], max_new_tokens=NEW)
    recorder = TokenRoutingRecorder(model.model)
    stream = model.stream(conversation, max_new_tokens=NEW, watch=recorder)
    assert recorder.routing() is None
    assert "".join(stream).strip() == model.decode(answer)
    routing = recorder.routing()
    assert routing is not None
    read = answer[:-1] if len(answer) == NEW else answer
    assert routing.tokens_S.tolist() == prompt["input_ids"][0].tolist() + read
    assert routing.prompt == prompt["input_ids"].shape[1]
    assert int(routing.is_image_S.sum()) == IMAGE_TOKENS
    assert routing.layers == (1, 3) and routing.names[3] == "text.0"
    shape = (2, len(routing.tokens_S), 2)
    assert routing.experts_LSK.shape == routing.weights_LSK.shape == shape
    torch.testing.assert_close(routing.weights_LSK.sum(dim=-1), torch.ones(shape[:2]))
    assert (routing.weights_LSK[..., 0] >= routing.weights_LSK[..., 1]).all()
    assert (routing.experts_LSK[:, routing.is_image_S] != 3).all()
    assert (routing.experts_LSK[:, ~routing.is_image_S] != 0).all()
    # The same choices as counted.
    want, _ = _by_hand(model, conversation)
    ids = routing.experts_LSK[1, : routing.prompt][routing.is_image_S[: routing.prompt]]
    assert torch.bincount(ids.flatten(), minlength=4).tolist() == want["prompt", "3", "vision"][1]
