"""The example of docs/moiie-layer.md runs, and what it builds is what the page says."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.mcore.parallel import destroy_parallel
from moiie_megatron.moe.dispatcher import MoIIETokenDispatcher
from moiie_megatron.moe.layer import MoIIELayer

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/moiie-layer.md"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The variables that the page's code leaves behind."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    script = tmp_path_factory.mktemp("page") / "example.py"
    script.write_text(code)
    yield runpy.run_path(str(script))
    destroy_parallel()


def test_every_layer_is_a_moiie_layer(example: dict[str, Any]) -> None:
    layers = [m for m in example["model"].modules() if isinstance(m, MoIIELayer)]
    assert len(layers) == 2
    assert all(isinstance(layer.token_dispatcher, MoIIETokenDispatcher) for layer in layers)
    assert example["losses"].shape == (2, 16)


def test_gradients_reach_routers_and_experts(example: dict[str, Any]) -> None:
    gradients = {name: p.grad for name, p in example["model"].named_parameters()}
    parts = {"gates.vision": 2, "gates.text": 2, "weight_fc1": 2, "weight_fc2": 2}
    for part, layers in parts.items():
        found = [gradient for name, gradient in gradients.items() if part in name]
        assert len(found) == layers, part
        assert all(gradient is not None and gradient.any() for gradient in found), part


def test_the_part_to_copy_is_short(example: dict[str, Any]) -> None:
    code = PAGE.read_text().partition("\nlayout = ")[2].partition("\ntokens = ")[0]
    assert 5 <= len(ast.parse("layout = " + code).body) <= 10
