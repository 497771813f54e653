"""Transformer Engine's layers on a GPU, against the reference's logits."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moiie_megatron.config.schema import MoEConfig, ParallelConfig
from moiie_megatron.convert.load_pretrained import load_pretrained
from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.mcore.parallel import ParallelContext, destroy_parallel, init_parallel
from tests.parity import golden, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
MOIIE = MoEConfig(router_init_std=0.3)


@pytest.fixture
def gpu() -> Iterator[ParallelContext]:
    yield init_parallel(ParallelConfig(), DistEnv(), device="cuda", seed=1)
    destroy_parallel()


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("moe", [None, MOIIE], ids=["dense", "upcycled"])
def test_logits_of_the_dense_reference(
    family: str, moe: MoEConfig | None, gpu: ParallelContext, tmp_path: Path
) -> None:
    """Also with experts, which are copies of the dense FFN (``test_upcycled_equals_dense``).

    Without Transformer Engine these are our own layers.  It rounds the factors of fp32 products
    to 10 bits (TF32), a wrong layer is off by 0.1 and more.
    """
    inputs = {n: t.cuda() for n, t in golden.tensors(f"tiny_{family}_moiie/inputs").items()}
    want = golden.tensors(f"tiny_{family}_dense/outputs")["ones.logits"]
    directory = str(golden.dense_directory(family, tmp_path / "dense"))
    config = tiny.run_config(tiny.language(family, pretrained=directory), moe)
    model = tiny.build(config, gpu)
    has_engine = importlib.util.find_spec("transformer_engine") is not None
    modules = {type(module).__module__ for module in model.modules()}
    assert any("transformer_engine" in name for name in modules) == has_engine
    load_pretrained(model, config)
    with torch.no_grad():
        logits = tiny.forward(model, inputs, "ones")
    assert (logits.cpu() - want).abs().max() < (2e-2 if has_engine else 1e-4)
