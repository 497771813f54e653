"""What cannot be right is refused in one sentence, before weights are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from engine import engine


@pytest.fixture
def export(material: Path, tmp_path: Path) -> Path:
    """A copy of an export without its weights: nothing may look for them."""
    ignored = shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json")
    return Path(shutil.copytree(material / "llama-moiie", tmp_path / "export", ignore=ignored))


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text())
    for key, value in changes.items():
        *outer, last = key.split(".")
        inner = values
        for name in outer:
            inner = inner[name]
        inner[last] = value
    file.write_text(json.dumps(values))


def refusal(folder: Path, **options: Any) -> str:
    """The sentence that names the reason."""
    with pytest.raises(ValueError, match="This MoIIE model cannot be served: ") as caught:  # noqa: SIM117
        with engine(folder, **options):
            pass
    (line,) = [line for line in str(caught.value).splitlines() if "cannot be served" in line]
    return line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"last_image_token_as_text": True}, "last_image_token_as_text is true"),
        ({"text_config.hidden_act": "gelu"}, "hidden_act is gelu"),
        (
            {
                "text_config.rope_parameters": {
                    "rope_type": "dynamic",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                },
                "text_config.max_position_embeddings": 128,
            },
            "use --max-model-len 128",
        ),
    ],
)
def test_models(export: Path, changes: dict[str, Any], words: str) -> None:
    change_config(export, changes)
    assert words in refusal(export)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2"),
        (
            {"tensor_parallel_size": 2, "enable_expert_parallel": True},
            "enable_expert_parallel is on",
        ),
        ({"ubatch_size": 2}, "micro-batches"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds is on"),
    ],
)
def test_options(export: Path, options: dict[str, Any], words: str) -> None:
    assert words in refusal(export, **options)


def test_what_is_not_refused_looks_for_weights(export: Path) -> None:
    """The sentences above do not come from the missing weights."""
    with pytest.raises(RuntimeError, match="Cannot find any model weights"), engine(export):
        pass
