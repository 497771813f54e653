"""The modality routers: choices, probabilities, z-loss, and what the dtype of the router does."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.layout.token_types import IMAGE, PADDING, TEXT
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.moe.router import ModalityRouter, RouterSettings, recording
from tests.unit.moe.layers import LAYOUT, TOKENS, router, tokens


def small_router(context: ParallelContext, layout: ExpertLayout = LAYOUT) -> ModalityRouter:
    """Hidden size 3, for examples by hand."""
    config = TransformerConfig(
        num_layers=1, hidden_size=3, num_attention_heads=1, moe_router_dtype="fp32"
    )
    settings = RouterSettings(layout, dict.fromkeys(layout.routers, 0.0), init_std=0.5)
    return ModalityRouter(config, context.groups, settings, device=torch.device("cpu"))


def scores_of(module: ModalityRouter, hidden: Tensor, types: Tensor) -> list[Tensor]:
    """Each token's scores by its own gate alone, written out."""
    found = []
    for row, kind in zip(hidden[:, 0], types[:, 0].tolist(), strict=True):
        found.append(module.gates["vision" if kind == IMAGE else "text"] @ row)
    return found


def test_top_two_of_the_own_router_renormalised(context: ParallelContext) -> None:
    module = router(context).eval()
    hidden, types = tokens()
    probs, chosen = module(hidden, types)
    for token, scores in enumerate(scores_of(module, hidden, types)):
        first = 0 if types[token, 0] == IMAGE else 1  # experts V S S T; text may use S S T
        top = torch.softmax(scores, dim=0).topk(2)
        wanted = torch.zeros(4)
        wanted[top.indices + first] = top.values / top.values.sum()
        assert torch.allclose(probs[token], wanted, atol=1e-6)
        assert torch.equal(chosen[token], wanted > 0)


def test_three_tokens_by_hand(context: ParallelContext) -> None:
    """The example in the head of ``moe/router.py``.

    Hidden states are unit vectors, so that the score of a token is one column of its gate:

                   a image  b text  c padding               a     b     c
        vision  V     1        9       9        text  S     9     0     3
                S     0        9       9              S     9     1     0
                S     2        9       9              T     9    0.5    3

    A 9 would be chosen if a token were scored by the other gate.
    """
    module = small_router(context).eval()
    types = torch.tensor([[IMAGE], [TEXT], [PADDING]], dtype=torch.int8)
    with torch.no_grad():
        module.gates["vision"].copy_(torch.tensor([[1.0, 9, 9], [0, 9, 9], [2, 9, 9]]))
        module.gates["text"].copy_(torch.tensor([[9.0, 0, 3], [9, 1, 0], [9, 0.5, 3]]))
        hidden = torch.eye(3).unsqueeze(1)
        scores = module.choose(hidden.squeeze(1), types.flatten()).scores_TE
        probs, chosen = module(hidden, types)
    no = float("-inf")
    assert scores.tolist() == [[1, 0, 2, no], [no, 0, 1, 0.5], [no, 3, 0, 3]]
    assert chosen.int().tolist() == [[1, 0, 1, 0], [0, 0, 1, 1], [0, 1, 0, 1]]
    by_hand = [[0.2689, 0, 0.7311, 0], [0, 0, 0.6225, 0.3775], [0, 0.5, 0, 0.5]]
    assert torch.allclose(probs, torch.tensor(by_hand), atol=1e-4)


def test_one_joint_gate_scores_every_token(context: ParallelContext) -> None:
    """Vanilla MoE: the type of a token does not matter."""
    module = small_router(context, ExpertLayout.from_variant("vanilla")).eval()
    hidden = torch.eye(3).unsqueeze(1)
    image = module(hidden, torch.full((3, 1), IMAGE, dtype=torch.int8))
    text = module(hidden, torch.full((3, 1), TEXT, dtype=torch.int8))
    assert torch.equal(image[0], text[0]) and torch.equal(image[1], text[1])
    wanted = torch.softmax(module.gates["joint"].t(), dim=-1).topk(2)
    assert torch.allclose(image[0].topk(2).values, wanted.values / wanted.values.sum(1, True))


def test_recording_counts_in_evaluation_mode_within_the_block(context: ParallelContext) -> None:
    module = router(context).eval()
    hidden, types = tokens()
    module(hidden, types)
    assert not module.stats.tokens_M.any()
    with recording(module):
        assert module.is_counting
        module(hidden, types)
    module.stats.add_up()
    counted = [int((types == IMAGE).sum()), int((types == TEXT).sum())]
    assert module.stats.tokens_M.tolist() == counted and not module.is_counting


def test_recording_ends_with_an_exception(context: ParallelContext) -> None:
    module = router(context).eval()
    with pytest.raises(KeyError), recording(module):
        raise KeyError
    assert not module.records_in_eval


def test_z_loss_and_its_gradient(context: ParallelContext) -> None:
    """Mean squared log-sum-exp by router over real tokens; nothing else attached."""
    module = router(context, z_loss=0.3)
    hidden, types = tokens()
    probs, _ = module(hidden, types)
    found = torch.autograd.grad(probs.sum() * 0.0, list(module.gates.values()))
    expected, logged = torch.zeros(()), []
    for kinds in ((IMAGE,), (TEXT,)):
        real = [
            torch.logsumexp(scores, dim=0).square()
            for scores, kind in zip(scores_of(module, hidden, types), types[:, 0], strict=True)
            if int(kind) in kinds
        ]
        logged.append(torch.stack(real).mean())
        expected = expected + 0.3 * logged[-1]
    wanted = torch.autograd.grad(expected, list(module.gates.values()))
    for got, want in zip(found, wanted, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-6) and want.abs().max() > 1e-3
    assert torch.allclose(module.stats.z_G.float(), torch.stack(logged).detach(), rtol=1e-5)


def test_padding_and_replay_are_not_counted(context: ParallelContext) -> None:
    """Counters take each real token once: padding never, a pass without gradients never."""
    module = router(context, alpha=0.01)
    hidden, types = tokens()
    with torch.no_grad():
        module(hidden, types)
    module.stats.add_up()
    assert not any(buffer.any() for buffer in module.stats.buffers())
    module(hidden, types)
    module.stats.add_up()
    real = torch.tensor([(types == IMAGE).sum(), (types == TEXT).sum()])
    assert torch.equal(module.stats.tokens_M, real.double())
    assert torch.equal(module.stats.load_ME.sum(dim=1), 2 * real.double())


def test_a_modality_without_tokens_costs_nothing(context: ParallelContext) -> None:
    module = router(context, alpha=1.0, z_loss=1.0)
    hidden, _ = tokens()
    types = torch.full((TOKENS, 1), TEXT, dtype=torch.int8)
    probs, _ = module(hidden, types)
    vision, text = torch.autograd.grad(probs.sum() * 0.0, list(module.gates.values()))
    assert not vision.any() and text.any()
    module.stats.add_up()
    assert module.stats.aux_G[0] == 0.0 and module.stats.aux_G[1] > 1.9


@pytest.mark.parametrize("router_dtype", ["fp32", None])
def test_dtype_of_the_router(context: ParallelContext, router_dtype: str | None) -> None:
    """fp32 computes the scores of bf16 values exactly; "model" rounds them to bf16.

    Either way the softmax is taken in fp32 and probabilities add up to 1.
    """
    module = router(context, dtype=torch.bfloat16, router_dtype=router_dtype).eval()
    hidden, types = tokens(torch.bfloat16)
    probs, chosen = module(hidden, types)
    assert probs.dtype == torch.float32
    assert torch.allclose(probs.sum(dim=1), torch.ones(TOKENS), atol=1e-6)
    exact = router(context).eval()
    exact.load_state_dict({k: v.float() for k, v in module.state_dict().items()}, strict=False)
    want, same = exact(hidden.float(), types)
    error = float((probs - want)[(chosen == same).all(dim=1)].abs().max())
    assert error < 1e-6 if router_dtype == "fp32" else 1e-5 < error < 0.02
