"""Which layouts are tried, in which order, and why others are not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.config.validate import check_config
from moiie_megatron.planning.hardware import gpu
from moiie_megatron.planning.plans.plan_report import layout_text, recompute_text
from moiie_megatron.planning.search.layouts import Refused, layouts, recomputations
from moiie_megatron.planning.search.scaling import (
    grown_configs,
    plan_scaling,
    scaling_text,
    seconds_by_kind,
)
from moiie_megatron.planning.search.search import SearchResult, SearchSize, search
from moiie_megatron.planning.search.search_report import search_text, search_values
from moiie_megatron.planning.search.written_config import write_config
from tests.helpers.user_errors import user_error
from tests.unit.planning.traces import CONFIGS, MadeSimulation, inputs, shipped

H100 = gpu("h100")


def test_every_layout_can_run_or_has_a_reason() -> None:
    config = shipped("llama3-stage2")
    found = list(layouts(config, 64, H100))
    possible = [one for one in found if isinstance(one, RunConfig)]
    refused = [one for one in found if isinstance(one, Refused)]
    assert len({layout_text(one) for one in possible}) == len(possible) > 100
    for one in possible:
        check_config(one, world_size=64)
        assert one.parallel.tensor <= 8
    assert {one.parallel.expert for one in possible} == {1, 2, 4}
    assert {one.parallel.virtual_pipeline for one in possible} == {1, 2, 4}
    reasons = {one.layout: one.reason for one in refused}
    assert all(reason.endswith(".") and reason.count(". ") == 0 for reason in reasons.values())
    # The words of the run's own check.
    assert (
        "use degrees whose product divides 32"
        in (reasons["TP 1, PP 16, VPP 4, EP 1, micro-batch 1"])
    )
    # 16.9B parameters with 2 + 4 bytes each, before the optimizer.
    too_large = reasons["TP 1, PP 1, EP 1, micro-batch 1"]
    assert "31.5 GiB" in too_large and "63.0 GiB" in too_large and "71.2 GiB" in too_large


def test_micro_batches_are_tried_without_packing() -> None:
    config = shipped("llama3-stage2", "data.packing=false", "parallel.expert=1")
    found = [one for one in layouts(config, 8, gpu("h200")) if isinstance(one, RunConfig)]
    assert {one.train.micro_batch_size for one in found} == {1, 2, 4, 8}


def test_recomputation_from_least_to_most() -> None:
    config = shipped("llama3-stage2", "megatron.recompute_modules=[core_attn]")
    assert [recompute_text(one) for one in recomputations(config)] == [
        "none",
        "core_attn",
        "mlp",
        "mlp+moe",
        "full, uniform 1",
    ]
    dense = shipped("llama3-stage1", "megatron.attention_dropout=0.1")
    assert [recompute_text(one) for one in recomputations(dense)] == [
        "none",
        "mlp",
        "full, uniform 1",
    ]
    assert all(one.megatron["attention_dropout"] == 0.1 for one in recomputations(dense))


@pytest.fixture(scope="module")
def result() -> tuple[MadeSimulation, SearchResult]:
    made = MadeSimulation()
    size = SearchSize(shallow=8, deep=2)
    return made, search(shipped("llama3-stage2"), 64, H100, inputs(), made, size)


def test_the_best_layout_comes_first(result: tuple[MadeSimulation, SearchResult]) -> None:
    made, found = result
    plans = [one.plan for one in found.found]
    middles = [plan.time.seconds.middle for plan in plans]
    assert len(plans) > 3 and middles == sorted(middles)
    assert all(plan.verdict != "does not fit" for plan in plans)
    assert sum(one.is_deep for one in found.found) == 2
    # As little is recomputed as fits.
    for plan in plans:
        if recompute_text(plan.config).startswith("full"):
            assert plan.fullest.memory.total > 0.2 * H100.memory
    deep = {layout_text(j.config) for j in made.jobs if j.config.language.num_layers == 32}
    assert {layout_text(one.plan.config) for one in found.found if one.is_deep} <= deep


def test_layouts_that_were_not_simulated_say_so(
    result: tuple[MadeSimulation, SearchResult],
) -> None:
    _, found = result
    assert len(found.not_simulated) > 100
    assert all("by arithmetic a step takes" in one.reason for one in found.not_simulated)
    text = search_text(found)
    for one in (*found.refused, *found.not_simulated):
        assert f"- {one.layout}: {one.reason}" in text
    values = json.loads(json.dumps(search_values(found)))
    assert values["found"][0]["layout_text"] == layout_text(found.found[0].plan.config)


def test_a_layout_whose_activations_do_not_fit_is_tried_with_more_recomputation() -> None:
    made = MadeSimulation()
    small = gpu("30,989,450,50")
    found = search(shipped("llama3-stage2"), 64, small, inputs(), made, SearchSize(6, 1))
    texts = [layout_text(one.plan.config) for one in found.found]
    degrees = [text.partition(", recompute ") for text in texts]
    again = [layout for layout, _, recomputed in degrees if recomputed == "full, uniform 1"]
    assert again and len(set(degrees)) == len(degrees)  # a layout is found once
    tried = [layout_text(job.config) for job in made.jobs]
    for layout in again:
        plain = re.sub(r" VPP \d,", "", layout)  # virtual stages are not simulated at first
        less = [tried.index(f"{plain}, recompute {how}") for how in ("none", "mlp", "mlp+moe")]
        assert less == sorted(less) and max(less) < tried.index(
            f"{plain}, recompute full, uniform 1"
        )


def test_nothing_fits() -> None:
    found = search(shipped("llama3-stage2"), 8, gpu("8,1,1,1"), inputs(), MadeSimulation())
    assert not found.found and not found.not_simulated
    assert "No layout fits." in search_text(found)


@pytest.mark.parametrize("overrides", [[], ["train.global_batch_size=256", "megatron={}"]])
def test_a_written_configuration_is_the_planned_one(tmp_path: Path, overrides: list[str]) -> None:
    base = CONFIGS / "phi3-stage2.yaml"
    names = ("OUTPUT", "LLM", "STAGE2_RECORDS", "STAGE2_IMAGES", "VISION", "STAGE1")
    environ = dict.fromkeys(names, "x")
    config = load_config(base, overrides, environ)
    planned = recomputations(
        config.model_copy(
            update={"parallel": config.parallel.model_copy(update={"tensor": 4, "pipeline": 2})}
        )
    )[-1]
    out = tmp_path / "new" / "run.yaml"
    write_config(out, base, overrides, planned, "Planned for 8 x H100.")
    read = load_config(out, [], environ)
    assert read.parallel == planned.parallel
    assert {k: v for k, v in read.megatron.items() if v is not None} == planned.megatron
    same = {"megatron": planned.megatron}
    assert read.model_copy(update=same) == planned
    assert yaml.safe_load(out.read_text())["base"].endswith("phi3-stage2.yaml")
    with user_error("--write", str(out)):
        write_config(out, base, overrides, planned, "again")


def test_scaling_keeps_the_samples_of_a_rank() -> None:
    made = MadeSimulation()
    config = shipped("llama3-stage2")
    points = plan_scaling(config, (8, 64, 512), H100, inputs(), made)
    assert [p.plan.config.train.global_batch_size for p in points] == [128, 1024, 8192]
    assert {len(p.plan.typical.micro_batches) for p in points} == {32}
    for point in points:
        kinds = seconds_by_kind(point.plan)
        assert sum(kinds.values()) == pytest.approx(point.plan.time.seconds.middle)
    # Gradients leave the node.
    slow = [p.plan.time.terms["gradient reduction"].high for p in points]
    assert slow[1] > slow[0]
    assert scaling_text(points).count("\n|") == 5
    with user_error("--scaling", 12, 8):
        grown_configs(config, (8, 12))
