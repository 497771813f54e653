"""Values of the ``megatron`` section that fit together, and those that do not."""

from __future__ import annotations

from typing import Any

import pytest

from moiie_megatron.config.megatron_section.check_model import check_megatron
from moiie_megatron.config.megatron_section.sections import megatron_fields
from moiie_megatron.config.schema import MoEConfig, ParallelConfig, RunConfig
from tests.helpers.user_errors import user_error
from tests.parity import tiny

FULL = {"recompute_granularity": "full", "recompute_num_layers": 2}
BLOCK = {**FULL, "recompute_method": "block"}
UNIFORM = {**FULL, "recompute_method": "uniform"}
SELECTIVE = {"recompute_granularity": "selective"}


def run(
    parallel: ParallelConfig | None = None, moe: MoEConfig | None = None, **megatron: Any
) -> RunConfig:
    """A run of four layers; experts, if any, are in layers 1 and 3."""
    parallel = parallel or ParallelConfig()
    return tiny.run_config(tiny.language("llama"), moe, parallel=parallel, megatron=megatron)


@pytest.mark.parametrize(
    "megatron",
    [
        {},
        {**BLOCK, "recompute_num_layers": 3},
        UNIFORM,
        SELECTIVE,
        {**SELECTIVE, "recompute_modules": ["core_attn", "moe", "mlp"]},
        {"init_method_std": 0.5, "hidden_dropout": 0.1},
        # Null takes back what a base file has set.
        {"recompute_granularity": None, "recompute_method": None, "hidden_dropout": None},
    ],
)
def test_possible_sections(megatron: dict[str, Any]) -> None:
    config = run(moe=MoEConfig(), **megatron)
    check_megatron(config)
    given = {name: value for name, value in megatron.items() if value is not None}
    assert megatron_fields(config) == given


@pytest.mark.parametrize(
    ("megatron", "parts"),
    [
        ({"hidden_size": 32}, ("megatron.hidden_size", "32", "language.hidden_size")),
        ({"fp8": "hybrid"}, ("megatron.fp8", "'hybrid'", "FP8", "train.precision=bf16")),
        ({"moe_router_fusion": True}, ("megatron.moe_router_fusion", "True", "moe section")),
        ({"recompute_granularty": "full"}, ("recompute_granularty", "did you mean")),
        ({"zzzzzz": 1}, ("megatron.zzzzzz", "docs/megatron-section.md")),
        ({"init_method_std": "wide"}, ("megatron.init_method_std", "'wide'", "number")),
        ({"init_method_std": -1}, ("megatron.init_method_std", "-1", "not below 0")),
        ({"hidden_dropout": 1}, ("megatron.hidden_dropout", "1", "0")),
        ({"bias_dropout_fusion": "maybe"}, ("bias_dropout_fusion", "maybe", "true or false")),
        ({"recompute_granularity": "everything"}, ("everything", "full or selective")),
        ({"recompute_method": "block"}, ("recompute_method", "recompute_granularity is null")),
        ({"recompute_modules": ["moe"]}, ("recompute_modules", "set it to selective")),
        ({**SELECTIVE, "recompute_num_layers": 1}, ("recompute_num_layers", "is selective")),
        (FULL, ("recompute_method is not given", "uniform or block")),
        ({"recompute_granularity": "full"}, ("is full", "is not given")),
        ({**BLOCK, "recompute_num_layers": 5}, ("recompute_num_layers is 5", "4 layers")),
        ({**BLOCK, "recompute_num_layers": 0}, ("recompute_num_layers is 0", "whole number")),
        ({**UNIFORM, "recompute_num_layers": 3}, ("recompute_num_layers is 3", "1, 2 or 4")),
        ({**SELECTIVE, "recompute_modules": []}, ("recompute_modules", "core_attn")),
        ({**SELECTIVE, "recompute_modules": ["ffn"]}, ("recompute_modules", "ffn", "moe_act")),
        (
            {"virtual_pipeline_model_parallel_size": 2},
            ("virtual_pipeline_model_parallel_size is 2", "parallel.virtual_pipeline"),
        ),
        ({"num_layers_in_first_pipeline_stage": 1}, ("is 1", "parallel.pipeline_layers")),
        (
            {"cross_entropy_fusion_impl": "te", "cross_entropy_loss_fusion": False},
            ("cross_entropy_fusion_impl is te", "cross_entropy_loss_fusion is false"),
        ),
        ({"moe_permute_fusion": True}, ("moe_permute_fusion is true", "moe.dispatcher=alltoall")),
    ],
)
def test_impossible_sections(megatron: dict[str, Any], parts: tuple[str, ...]) -> None:
    with user_error(*parts):
        check_megatron(run(moe=MoEConfig(), **megatron))


@pytest.mark.parametrize("module", ["moe", "moe_act", "layernorm"])
def test_a_dense_stage_recomputes_no_experts(module: str) -> None:
    with user_error("megatron.recompute_modules", module, "stage.moe"):
        check_megatron(run(**SELECTIVE, recompute_modules=[module]))


def test_a_dense_stage_sorts_no_rows() -> None:
    with user_error("megatron.moe_permute_fusion is true", "stage.moe"):
        check_megatron(run(moe_permute_fusion=True))


def test_there_may_be_no_dense_layer_to_recompute() -> None:
    with user_error("megatron.recompute_modules", "mlp", "use moe"):
        config = run(moe=MoEConfig(layers="all"), **SELECTIVE, recompute_modules=["mlp"])
        check_megatron(config)


def test_recomputed_layers_are_those_of_a_stage() -> None:
    uneven = ParallelConfig(pipeline=2, pipeline_layers=[1, 3])
    three = {"recompute_granularity": "full", "recompute_num_layers": 3}
    check_megatron(run(uneven, **three, recompute_method="block"))
    with user_error("recompute_num_layers is 3", "has 1 layers"):
        check_megatron(run(uneven, **three, recompute_method="uniform"))
    virtual = ParallelConfig(pipeline=2, virtual_pipeline=2)
    with user_error("recompute_num_layers is 2", "has 1 layers"):
        check_megatron(run(virtual, **BLOCK))
