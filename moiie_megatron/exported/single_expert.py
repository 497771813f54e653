"""One expert alone in every MoE layer: what single experts have learned (paper, table 6).

``tools/convert.py extract`` writes such a model to disk; this turns a loaded export into it.
"""

from __future__ import annotations

from typing import Any, Final

import torch.nn.functional as F
from torch import Tensor, nn

from moiie_megatron.utils.errors import UserError

GROUPS: Final = ("vision", "shared", "text")


class SingleExpert(nn.Module):
    """One expert in the place of a layer's router and experts, with weight 1 for every token.

    Args:
        experts: All experts of the layer, of which the weights of one are shared.
        expert: Its logical id.
    """

    def __init__(self, experts: Any, expert: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(experts.gate_up_proj[expert], requires_grad=False)
        self.down_proj = nn.Parameter(experts.down_proj[expert], requires_grad=False)
        self.act_fn = experts.act_fn

    def forward(self, hidden_states: Tensor, is_image: Tensor) -> Tensor:
        """``(B, S, H)`` to ``(B, S, H)``; the modality does not matter."""
        gate, up = F.linear(hidden_states, self.gate_up_proj).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate) * up, self.down_proj)


def use_expert(model: Any, name: str) -> None:
    """Make every MoE layer of an export compute one expert alone.

    Routers and other experts are removed from the model; loading it again brings them back.

    Args:
        model: As transformers loads an export.
        name: ``shared.0``; or ``vision``, ``shared``, ``text`` if the group has one expert.

    Raises:
        UserError: The model has no such expert, several of the group, or none at all.
    """
    expert = _expert_id(model, name)
    for layer in moe_layers(model).values():
        layer.mlp = SingleExpert(layer.mlp.experts, expert)


def expert_names(model: Any) -> list[str]:
    """Names by logical id, ``vision.0`` first; empty for a dense model.

    Raises:
        UserError: ``use_expert`` has been called for the model.
    """
    layers = moe_layers(model).values()
    if any(isinstance(layer.mlp, SingleExpert) for layer in layers):
        raise UserError("The model has one expert left in every layer: load the export again.")
    counts = model.config.experts
    return [f"{group}.{i}" for group in GROUPS for i in range(counts[group])] if layers else []


def moe_layers(model: Any) -> dict[int, Any]:
    """The decoder layers with experts by number (from 0)."""
    layers = model.model.language_model.layers
    return {number: layers[number] for number in model.config.moe_layers}


def _expert_id(model: Any, name: str) -> int:
    names = expert_names(model)
    if not names:
        raise UserError(f"The expert is {name} but the model is dense: leave the expert out.")
    members = [member for member in names if name in (member, member.split(".")[0])]
    if not members:
        raise UserError(f"The model has no expert {name}: use {' or '.join(names)}.")
    if len(members) > 1:
        raise UserError(
            f"The expert is {name}, of which there are several: use {' or '.join(members)}."
        )
    return names.index(members[0])
