"""The arithmetic against transformers' models, and against the sizes that the paper gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from moiie_megatron.config.schema import LanguageConfig, RunConfig, VisionConfig
from moiie_megatron.families.hf_config import language_to_hf, vision_to_hf
from moiie_megatron.planning.parameters import count_parameters, format_parameters
from tests.unit.config.minimal import load_minimal


def _config(folder: Path, *overrides: str) -> RunConfig:
    return load_minimal(folder, overrides)


def _size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _hf_language(language: LanguageConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(language_to_hf(language, {"pad_token_id": 0}))


def _hf_vision(vision: VisionConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModel.from_config(vision_to_hf(vision))


@pytest.mark.parametrize(
    "overrides",
    [
        ["language.preset=tiny-llama"],
        ["language.preset=tiny-llama", "language.tied_embeddings=true"],
        ["language.preset=tiny-phi3"],
        ["language.preset=llama3-8b"],
        ["language.preset=phi3-mini"],
        ["language.preset=mistral-7b"],
        ["language.preset=qwen2.5-7b"],
        ["language.preset=qwen3-8b"],
    ],
)
def test_dense_language_model(tmp_path: Path, overrides: list[str]) -> None:
    config = _config(tmp_path, *overrides, "stage.preset=stage-connector")
    count = count_parameters(config)
    assert count.total - count.vision - count.connector == _size(_hf_language(config.language))
    assert count.activated == count.total
    assert count.experts == count.routers == 0


@pytest.mark.parametrize(
    ("preset", "billions"), [("mistral-7b", 7.24), ("qwen2.5-7b", 7.62), ("qwen3-8b", 8.19)]
)
def test_sizes_of_published_models(tmp_path: Path, preset: str, billions: float) -> None:
    """What the files on the hub hold."""
    overrides = [f"language.preset={preset}", "stage.preset=stage-connector"]
    count = count_parameters(_config(tmp_path, *overrides))
    assert round((count.total - count.vision - count.connector) / 1e9, 2) == billions


@pytest.mark.parametrize("preset", ["tiny-siglip", "tiny-clip", "siglip-so400m-384", "clip-l-336"])
def test_vision_encoder(tmp_path: Path, preset: str) -> None:
    config = _config(
        tmp_path,
        f"vision.preset={preset}",
        "language.preset=llama3-8b",
        "data.sequence_length=4096",
    )
    assert count_parameters(config).vision == _size(_hf_vision(config.vision))


@pytest.mark.parametrize("hidden", [None, 48])
def test_connector(tmp_path: Path, hidden: int | None) -> None:
    config = _config(
        tmp_path,
        "language.hidden_size=32",
        f"connector.hidden_size={'null' if hidden is None else hidden}",
    )
    width = hidden or 32
    model = torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.Linear(width, 32))
    assert count_parameters(config).connector == _size(model)


@pytest.mark.parametrize(
    ("overrides", "experts", "active", "router_rows", "dense_layers"),
    [
        # Tiny Llama: 4 layers, hidden 64, FFN 128; interleaved means layers 1 and 3.
        ([], 2 * 4, 2 * 2, 2 * (3 + 3), 2),
        (["moe.layers=all"], 4 * 4, 4 * 2, 4 * (3 + 3), 0),
        (["moe.layers=[2]", "moe.top_k=3"], 4, 3, 3 + 3, 3),
        (["moe.variant=vanilla"], 2 * 4, 2 * 2, 2 * 4, 2),
        (["moe.variant=modality"], 2 * 4, 2 * 2, 2 * (2 + 2), 2),
        (["moe.num_vision_experts=3", "moe.num_text_experts=2"], 2 * 7, 2 * 2, 2 * (5 + 4), 2),
    ],
)
def test_experts(
    tmp_path: Path,
    overrides: list[str],
    experts: int,
    active: int,
    router_rows: int,
    dense_layers: int,
) -> None:
    count = count_parameters(_config(tmp_path, *overrides))
    ffn = 3 * 64 * 128
    assert count.experts == experts * ffn
    assert count.active_experts == active * ffn
    assert count.routers == router_rows * 64
    assert count.dense_ffn == dense_layers * ffn


@pytest.mark.parametrize(
    ("preset", "activated", "least", "most"),
    [("llama3-8b", 11.3e9, 16e9, 17e9), ("phi3-mini", 5.5e9, 7e9, 8e9)],
)
def test_sizes_of_the_paper(
    tmp_path: Path, preset: str, activated: float, least: float, most: float
) -> None:
    config = _config(
        tmp_path,
        f"language.preset={preset}",
        "vision.preset=siglip-so400m-384",
        "data.sequence_length=4096",
    )
    count = count_parameters(config)
    # The paper rounds to one decimal.
    assert round(count.activated / 1e9, 1) == activated / 1e9
    assert least < count.total < most


def test_table(tmp_path: Path) -> None:
    config = _config(
        tmp_path,
        "language.preset=phi3-mini",
        "language.tied_embeddings=true",
        "vision.preset=siglip-so400m-384",
        "data.sequence_length=4096",
    )
    lines = format_parameters(count_parameters(config)).splitlines()
    parts = {line[:16].strip(): line[16:].split() for line in lines}
    assert parts["experts"] == ["4.83", "B", "62.2%"]
    assert parts["routers"] == ["294.91", "K", "0.0%"]
    assert parts["total"][-1] == "100.0%"
    assert "output layer" not in parts  # tied: nothing to show
    assert len({len(line) for line in lines}) == 1
