"""Logits are computed for tokens with a label alone, and the loss is that of all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moiie_megatron.config.schema import MoEConfig
from moiie_megatron.data.encode.encoder import IGNORE
from moiie_megatron.layout.token_types import TEXT
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.vlm.model import MoIIEModel
from tests.parity.tiny import build, language, run_config

MOE = MoEConfig(num_vision_experts=1, num_shared_experts=2, num_text_experts=1)


@pytest.fixture(scope="module")
def model(context: ParallelContext) -> MoIIEModel:
    return build(run_config(language("llama"), MOE), context)


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {
        "tokens": torch.randint(0, 256, (3, 20)),
        "position_ids": torch.arange(20).repeat(3, 1),
        "token_types": torch.full((3, 20), TEXT, dtype=torch.int8),
    }


def gradients(model: MoIIEModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_loss_and_gradients_of_all_logits(model: MoIIEModel) -> None:
    batch = inputs()
    labels = torch.where(torch.rand(3, 20) < 0.4, torch.randint(0, 256, (3, 20)), IGNORE)
    rows = []
    hook = model.language_model.output_layer.register_forward_hook(
        lambda module, args, output: rows.append(output[0].shape[:2].numel())
    )
    losses = model(**batch, labels=labels)
    got = gradients(model, losses)
    logits = model(**batch)
    hook.remove()
    every = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORE)

    assert rows == [int((labels != IGNORE).sum()), labels.numel()]
    torch.testing.assert_close(losses, every, rtol=0, atol=1e-5)
    expected = gradients(model, every)
    assert got.keys() == expected.keys() and len(got) > 30
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_nothing_to_learn(model: MoIIEModel) -> None:
    """A micro-batch without labels takes part in backward, with zeros."""
    losses = model(**inputs(), labels=torch.full((3, 20), IGNORE))
    assert losses.shape == (3, 20) and not losses.any()
    output = gradients(model, losses)["language_model.output_layer.weight"]
    assert not output.any()
