"""Which experts every single token of one conversation takes.

Shapes: S tokens of prompt and answer, L MoE layers, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moiie_megatron.exported.routing_hooks import Choices, RoutingWatch, Step


@dataclass(frozen=True)
class TokenRouting:
    """The routing of one conversation, on the CPU.

    Attributes:
        names: Experts by logical id.
        layers: Numbers of the MoE layers (from 0).
        tokens_S: Token ids.
        is_image_S: Image tokens.
        prompt: How many tokens are the prompt.
        experts_LSK: Logical ids, the one of the larger weight first.
        weights_LSK: Add up to 1.
    """

    names: tuple[str, ...]
    layers: tuple[int, ...]
    tokens_S: Tensor
    is_image_S: Tensor
    prompt: int
    experts_LSK: Tensor
    weights_LSK: Tensor


class TokenRoutingRecorder(RoutingWatch):
    """Keeps the choices of one generation, of one prompt.

    Raises:
        UserError: See ``RoutingWatch``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._prompt = 0
        self._steps: list[Step] = []
        self._choices: dict[int, list[tuple[Tensor, Tensor]]] = {n: [] for n in self.layers}

    def see(self, layer: int, step: Step, choices: Choices) -> None:
        if len(step.tokens_BS) != 1:
            raise RuntimeError(f"{len(step.tokens_BS)} prompts; single tokens are kept of one")
        if layer == self.layers[0]:
            self._steps.append(step)
            self._prompt += 0 if step.is_answer else step.tokens_BS.shape[1]
        self._choices[layer].append((choices.experts_TK, choices.weights_TK))

    def routing(self) -> TokenRouting | None:
        """What has been seen so far in all layers; None before the first step ends."""
        # A step that is being computed in another thread has not reached the last layer.
        steps = len(self._choices[self.layers[-1]])
        if not steps:
            return None
        seen = self._steps[:steps]
        columns = [self._choices[layer][:steps] for layer in self.layers]
        return TokenRouting(
            names=tuple(self.experts),
            layers=tuple(self.layers),
            tokens_S=torch.cat([step.tokens_BS[0] for step in seen]).cpu(),
            is_image_S=torch.cat([step.is_image_BS[0] for step in seen]).cpu(),
            prompt=self._prompt,
            experts_LSK=torch.stack([torch.cat([ids for ids, _ in c]) for c in columns]).cpu(),
            weights_LSK=torch.stack([torch.cat([w for _, w in c]) for c in columns]).cpu(),
        )
