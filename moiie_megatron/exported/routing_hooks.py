"""Watches the routers of an export while it answers.

Shapes: B prompts, S positions of a step, T = B * S tokens, E experts, K experts per token.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from moiie_megatron.exported.single_expert import expert_names, moe_layers
from moiie_megatron.utils.errors import UserError


@dataclass(frozen=True)
class Step:
    """One forward pass.

    Attributes:
        tokens_BS: Token ids.
        is_image_BS: Tokens of the vision router.
        counts_BS: Neither padding nor behind the end of an answer.
        is_answer: Of what has been generated; else of the prompts.
    """

    tokens_BS: Tensor
    is_image_BS: Tensor
    counts_BS: Tensor
    is_answer: bool


@dataclass(frozen=True)
class Choices:
    """What one layer's routers decided in a step.

    Attributes:
        scores_TE: -inf at the experts that a token may not use.
        weights_TK: Add up to 1.
        experts_TK: Logical ids.
    """

    scores_TE: Tensor
    weights_TK: Tensor
    experts_TK: Tensor


class RoutingWatch(abc.ABC):
    """Calls ``see`` for every MoE layer of every step inside a ``with`` block.

    Generation must use the cache, as it does by default: without it every step repeats the prompt.

    Args:
        model: As transformers loads an export, with experts.

    Raises:
        UserError: It is dense, or one expert has been chosen for all tokens.
    """

    def __init__(self, model: Any) -> None:
        self.experts = expert_names(model)
        if not self.experts:
            raise UserError("The model is dense, it routes nothing: name one with experts.")
        self.layers = list(moe_layers(model))
        self.top_k: int = model.config.num_experts_per_tok
        self._model = model
        self._tokens_BS: Tensor | None = None
        self._step: Step | None = None
        self._handles: list[Any] = []

    @abc.abstractmethod
    def see(self, layer: int, step: Step, choices: Choices) -> None:
        """Called in the order of the layers."""

    def __enter__(self) -> Self:
        decoder = self._model.model.language_model
        self._handles = [
            self._model.register_forward_pre_hook(self._take_tokens, with_kwargs=True),
            decoder.register_forward_pre_hook(self._begin_step, with_kwargs=True),
        ]
        for number, layer in moe_layers(self._model).items():
            hook = self._layer_hook(number)
            self._handles.append(layer.mlp.top_k.register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _take_tokens(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tokens_BS = args[0] if args else kwargs.get("input_ids")

    def _begin_step(self, _: Any, __: Any, kwargs: dict[str, Any]) -> None:
        if self._tokens_BS is None:
            raise RuntimeError("routing is watched for input_ids, not for inputs_embeds alone")
        caches = [kwargs.get(name) for name in ("cache", "past_key_values")]
        has_past = any(cache is not None and int(cache.get_seq_length()) > 0 for cache in caches)
        self._step = self._new_step(self._tokens_BS, kwargs, has_past)

    def _new_step(self, tokens_BS: Tensor, kwargs: dict[str, Any], has_past: bool) -> Step:
        length = tokens_BS.shape[1]
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise RuntimeError("an attention mask of two dimensions is needed to leave out padding")
        counts_BS = (
            torch.ones_like(tokens_BS, dtype=torch.bool) if mask is None else mask[:, -length:] > 0
        )
        is_answer = has_past and length == 1
        if is_answer:  # rows that have ended go on with padding until all have
            counts_BS = counts_BS & ~torch.isin(tokens_BS, self._ends(tokens_BS.device))
        return Step(tokens_BS, kwargs["is_image"], counts_BS, is_answer)

    def _ends(self, device: torch.device) -> Tensor:
        generation = self._model.generation_config
        ends = generation.eos_token_id
        ends = [*ends] if isinstance(ends, (list, tuple)) else [ends]
        ids = [token for token in (*ends, generation.pad_token_id) if token is not None]
        return torch.tensor(ids, device=device)

    def _layer_hook(self, number: int) -> Any:
        def hook(_: Any, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            assert self._step is not None  # the decoder runs its layers
            with torch.no_grad():
                self.see(number, self._step, Choices(*output))

        return hook
