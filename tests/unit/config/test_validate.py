from __future__ import annotations

from pathlib import Path

import pytest

from moiie_megatron.config.validate import check_config
from tests.helpers.user_errors import user_error
from tests.unit.config.minimal import load_minimal

VIRTUAL = ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["language.hidden_size=72", "language.num_attention_heads=8"],
            ("language.hidden_size", "72", "language.num_attention_heads", "8", "multiple of 16"),
        ),
        (
            ["language.hidden_size=66"],
            ("language.hidden_size", "66", "language.num_attention_heads", "4", "multiple of 8"),
        ),
        (
            ["language.num_query_groups=3"],
            ("language.num_query_groups", "3", "language.num_attention_heads", "4", "1, 2 or 4"),
        ),
        (["profile.steps=[5, 3]"], ("profile.steps", "[5, 3]", "first")),
        (
            ["evaluation.interval=500"],
            ("evaluation.interval", "500", "evaluation.sets", "evaluation.tasks"),
        ),
        (
            ["evaluation.interval=750", "evaluation.tasks=[POPE]"],
            ("evaluation.interval", "750", "checkpoint.interval", "500"),
        ),
        (["evaluation.tasks=[a/b]"], ("evaluation", "'a/b'", "letters")),
        (
            ["evaluation.sets=[{name: x, records: r, images: i}]", "evaluation.tasks=[x]"],
            ("evaluation", "'x'", "rename"),
        ),
        (
            ["moe.expert_loads=[1.0, 2.0]"],
            ("moe.expert_loads", "2 numbers", "4 experts"),
        ),
        (
            ["language.longrope={short_factor: [1.0], long_factor: [2.0], factor: 2.0}"],
            ("language.longrope.short_factor", "1 numbers", "16 channels", "8"),
        ),
        (
            [
                "language.longrope={short_factor: [1.0], long_factor: [2.0], factor: 2.0}",
                "language.rope_scaling={factor: 8.0}",
            ],
            ("language.rope_scaling", "language.longrope"),
        ),
        (
            ["data.packing=true", "moe.last_image_token_as_text=true"],
            ("data.packing", "true", "moe.last_image_token_as_text"),
        ),
        (
            [
                "data.packing=true",
                "language.longrope={short_factor: [1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0], "
                "long_factor: [2.0,2.0,2.0,2.0,2.0,2.0,2.0,2.0], factor: 2.0, "
                "original_max_position_embeddings: 32}",
            ],
            (
                "data.packing",
                "true",
                "data.sequence_length",
                "64",
                "language.longrope",
                "32 positions",
            ),
        ),
        (
            ["data.packing=true", "moe.dispatcher=allgather"],
            ("moe.dispatcher", "allgather", "data.padding", "longest"),
        ),
        (
            ["language.qk_norm=true"],
            ("language.qk_norm", "true", "false", "llama"),
        ),
        (
            ["language.family=qwen2"],
            ("language.qkv_bias", "false", "true", "qwen2"),
        ),
        (["language.head_dim=15"], ("language.head_dim", "15", "even")),
        (
            ["language.family=mixtral"],
            (
                "language.family",
                "mixtral",
                "stage.moe",
                "true",
                "moe.variant",
                "moiie",
                "moe.layers",
                "interleaved",
            ),
        ),
        (
            ["language.family=mixtral", "moe.variant=vanilla"],
            ("moe.variant", "vanilla", "moe.layers", "interleaved", "all"),
        ),
        (
            ["language.family=mixtral", "moe={variant: vanilla, layers: all}", "stage.moe=false"],
            ("stage.moe", "false"),
        ),
        (
            ["vision.image_size=6"],
            ("vision.image_size", "6", "vision.patch_size", "7", "7 or more"),
        ),
        (
            ["vision.num_attention_heads=5"],
            (
                "vision.num_attention_heads",
                "5",
                "vision.hidden_size",
                "64",
                "1, 2, 4, 8, 16, 32 or 64",
            ),
        ),
        (
            ["vision.feature_layer=-4"],
            ("vision.feature_layer", "-4", "vision.num_layers", "3", "-3 to -1"),
        ),
        (["moe.top_k=4"], ("moe.top_k", "4", "vision", "3 experts")),
        (["moe.top_k=4", "stage.preset=stage-connector"], ("moe.top_k", "4", "vision")),
        (
            ["moe.layers=[1, 4]"],
            ("moe.layers", "[1, 4]", "interleaved", "0 to 3"),
        ),
        (["moe.layers=[9]", "stage.preset=stage-connector"], ("moe.layers", "[9]", "interleaved")),
        (["moe.layers=[]"], ("moe.layers", "[]", "interleaved")),
        (
            ["language.num_layers=1"],
            ("moe.layers", "'interleaved'", "language.num_layers", "1"),
        ),
        (
            ["parallel.expert=3"],
            ("parallel.expert", "3", "4 experts", "1, 2 or 4"),
        ),
        (
            ["parallel.expert_tensor=3"],
            (
                "parallel.expert_tensor",
                "3",
                "language.ffn_hidden_size",
                "128",
                "1, 2, 4, 8, 16, 32, 64 or 128",
            ),
        ),
        (
            ["parallel.expert_tensor=32"],
            ("language.ffn_hidden_size", "128", "parallel.expert_tensor", "32", "multiple of 8"),
        ),
        (
            ["language.ffn_hidden_size=100"],
            ("language.ffn_hidden_size", "100", "parallel.expert_tensor", "1"),
        ),
        (
            ["language.hidden_size=60", "language.num_attention_heads=2"],
            ("language.hidden_size", "60", "multiple of 8"),
        ),
        (
            ["stage.template=vicuna"],
            ("stage.template", "'vicuna'", "plain, llama3, phi3 or tokenizer"),
        ),
        (
            ["stage.preset=stage-connector", "stage.learning_rates.connector=null"],
            ("stage.learning_rates", "empty"),
        ),
        (
            ["stage.moe=false"],
            ("stage.learning_rates.moe", "2e-05", "stage.moe", "false", "moe.variant", "moiie"),
        ),
        (
            ["moe.variant=dense"],
            ("stage.learning_rates.moe", "2e-05", "stage.moe", "true", "moe.variant", "dense"),
        ),
        (
            ["parallel.pipeline=3"],
            ("parallel.pipeline", "3", "language.num_layers", "4", "1, 2 or 4", "pipeline_layers"),
        ),
        (
            ["parallel.virtual_pipeline=2"],
            ("parallel.virtual_pipeline is 2", "parallel.pipeline is 1"),
        ),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=3"],
            ("parallel.pipeline is 2 and parallel.virtual_pipeline is 3", "divides 4"),
        ),
        (
            ["parallel.pipeline=2", "parallel.pipeline_layers=[1, 2]"],
            ("parallel.pipeline_layers is [1, 2] (3 layers)", "language.num_layers is 4"),
        ),
        (
            ["parallel.pipeline=2", "parallel.pipeline_layers=[1, 1, 2]"],
            ("parallel.pipeline_layers is [1, 1, 2]", "parallel.pipeline is 2", "2 numbers"),
        ),
        (
            ["parallel.pipeline=2", "parallel.pipeline_layers=[0, 4]"],
            ("parallel.pipeline_layers.0 is 0", "above 0"),
        ),
        (
            ["parallel.tensor=8"],
            ("parallel.tensor", "8", "language.num_attention_heads", "4", "1, 2 or 4"),
        ),
        (
            [
                "parallel.tensor=4",
                "language.ffn_hidden_size=136",
                "language.hidden_size=72",
                "language.num_attention_heads=12",
                "language.num_query_groups=3",
            ],
            ("parallel.tensor", "4", "language.num_query_groups", "3", "multiple of 3"),
        ),
        # 8 heads of 2 channels and one group: 20 rows do not split into 8 parts.
        (
            [
                "parallel.tensor=8",
                "language.hidden_size=16",
                "language.num_attention_heads=8",
                "language.num_query_groups=1",
            ],
            ("20 rows",),
        ),
        (
            ["parallel.tensor=4", "language.ffn_hidden_size=126", "stage.preset=stage-dense"],
            ("parallel.tensor", "4", "language.ffn_hidden_size", "126", "divisor of 126"),
        ),
        (
            ["parallel.sequence=true"],
            ("parallel.sequence", "true", "parallel.tensor", "1", "2 or more"),
        ),
        (
            ["parallel.tensor=2", "parallel.sequence=false"],
            ("parallel.sequence", "false", "parallel.tensor", "2"),
        ),
        (["data.image_token=''"], ("data.image_token", "''", "<image>")),
        (
            ["data.sequence_length=17"],
            ("data.sequence_length", "17", "16 tokens", "18 or more"),
        ),
        (
            ["data.sequence_length=513"],
            ("data.sequence_length", "513", "language.max_position_embeddings", "512"),
        ),
        (
            ["parallel.tensor=4", "data.sequence_length=62"],
            ("data.sequence_length", "62", "parallel.tensor", "multiple of 4"),
        ),
        (
            ["train.steps=null"],
            ("train.steps", "null", "train.epochs", "exactly one"),
        ),
        (
            ["train.epochs=1"],
            ("train.steps", "3", "train.epochs", "1.0", "exactly one"),
        ),
        (
            ["train.micro_batch_size=3"],
            ("train.global_batch_size", "4", "train.micro_batch_size", "3", "multiple of 3"),
        ),
    ],
)
def test_impossible_combination(
    tmp_path: Path, overrides: list[str], parts: tuple[str, ...]
) -> None:
    with user_error(*parts):
        load_minimal(tmp_path, overrides)


def test_measured_loads_place_the_experts(tmp_path: Path) -> None:
    """Two busy experts on one rank in the logical order go to two ranks."""
    loads = "moe.expert_loads=[6.0, 6.0, 1.0, 1.0]"
    config = load_minimal(tmp_path, ["parallel.expert=2", loads])
    check_config(config)
    assert (
        config.placement.physical_to_logical == (0, 2, 1, 3) and config.placement.imbalance == 1.0
    )
    assert load_minimal(tmp_path, ["parallel.expert=2"]).placement.physical_to_logical == (
        0,
        1,
        2,
        3,
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.tensor=2"],
        ["parallel.tensor=4"],  # two query groups shared by four ranks
        ["parallel.pipeline=4", "parallel.expert=4", "parallel.expert_tensor=2"],
        ["parallel.pipeline=3", "parallel.pipeline_layers=[2, 1, 1]"],
        ["parallel.expert=3", "stage.preset=stage-connector"],  # not used by a dense stage
        ["moe.variant=dense", "stage.learning_rates.moe=null"],
        ["stage.learning_rates={moe: null}"],  # experts, but frozen
        ["parallel.tensor=2", "parallel.sequence=false", "stage.preset=stage-dense"],
        ["data.sequence_length=18"],
        ["data.sequence_length=512"],
        ["train.steps=null", "train.epochs=0.5"],
        ["vision.feature_layer=-3"],
        ["language.ffn_hidden_size=100", "stage.preset=stage-dense"],
        ["moe.layers=[0]", "moe.num_vision_experts=3", "moe.num_text_experts=3"],
    ],
)
def test_possible_combination(tmp_path: Path, overrides: list[str]) -> None:
    check_config(load_minimal(tmp_path, overrides))


@pytest.mark.parametrize(
    ("overrides", "world_size", "parts"),
    [
        (
            ["parallel.tensor=2", "parallel.pipeline=2"],
            6,
            ("parallel.tensor", "2", "parallel.pipeline", "6 ranks", "4 ranks", "multiple of 4"),
        ),
        (
            ["parallel.expert=2", "parallel.expert_tensor=2"],
            2,
            (
                "parallel.expert",
                "2",
                "parallel.expert_tensor",
                "parallel.pipeline",
                "1",
                "2 ranks",
                "4 ranks",
                "multiple of 4",
            ),
        ),
        (["parallel.expert=4", "parallel.pipeline=2"], 4, ("8 ranks",)),
        (["profile={steps: [1, 2], ranks: [0, 4]}"], 4, ("profile.ranks", "4")),
        (
            [],
            3,
            (
                "train.global_batch_size",
                "4",
                "train.micro_batch_size",
                "1",
                "3 data-parallel ranks",
                "multiple of 3",
            ),
        ),
        (
            ["train.micro_batch_size=2", "parallel.tensor=2"],
            6,
            ("3 data-parallel ranks", "multiple of 6"),
        ),
        # The interleaved schedule takes two micro-batches at a time, and rows are samples at least.
        (
            [*VIRTUAL, "train.micro_batch_size=4"],
            2,
            ("global_batch_size is 4", "virtual_pipeline is 2", "2 micro-batches", "multiple of 8"),
        ),
        (
            [*VIRTUAL, "data.packing=true"],
            8,
            ("global_batch_size is 4", "2 rows", "each of 4 data-parallel ranks", "multiple of 8"),
        ),
    ],
)
def test_impossible_world(
    tmp_path: Path, overrides: list[str], world_size: int, parts: tuple[str, ...]
) -> None:
    config = load_minimal(tmp_path, overrides)
    with user_error(*parts):
        check_config(config, world_size=world_size)


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        ([], 1),
        (["parallel.expert=4"], 4),
        (["parallel.expert=4", "stage.preset=stage-connector"], 2),
        (["parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2"], 4),
        ([*VIRTUAL, "train.micro_batch_size=2"], 2),
        ([*VIRTUAL, "train.micro_batch_size=2", "data.packing=true"], 4),
        (["parallel.tensor=2", "parallel.expert_tensor=2", "parallel.expert=2"], 4),
    ],
)
def test_possible_world(tmp_path: Path, overrides: list[str], world_size: int) -> None:
    config = load_minimal(tmp_path, overrides)
    check_config(config, world_size=world_size)
