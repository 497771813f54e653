"""Which experts exist and which tokens may use them: one value for all four systems compared.

Dense, Vanilla MoE, Modality MoE and MoIIE are four *values* of ``ExpertLayout`` (paper,
section 3 and table 1).  Expert ids are logical: vision experts first, then shared, then text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moiie_megatron.utils.errors import UserError

Router = Literal["vision", "text", "joint"]
Variant = Literal["dense", "vanilla", "modality", "moiie"]

_DEFAULT_COUNTS: dict[str, tuple[int, int, int]] = {
    # (vision, shared, text), the four-expert systems of the paper
    "dense": (0, 0, 0),
    "vanilla": (0, 4, 0),
    "modality": (2, 0, 2),
    "moiie": (1, 2, 1),
}


@dataclass(frozen=True)
class ExpertLayout:
    """The number of experts in each group, and how many of them process a token.

    Args:
        num_vision: Experts that only image tokens may use.
        num_shared: Experts that every token may use.
        num_text: Experts that only text tokens may use.
        top_k: Experts per token, 2 or more.

    Raises:
        UserError: A negative count, ``top_k`` below 2, or a modality with fewer experts than
            ``top_k``.
    """

    num_vision: int
    num_shared: int
    num_text: int
    top_k: int = 2

    def __post_init__(self) -> None:
        for name in ("num_vision", "num_shared", "num_text"):
            if getattr(self, name) < 0:
                raise UserError(f"moe.{name}_experts is {getattr(self, name)}: use 0 or more.")
        if not self.num_experts:
            return
        if self.top_k < 2:
            raise UserError(
                f"moe.top_k is {self.top_k}: use 2 or more, because the weights of a token's "
                "experts are normalized to 1, so that one expert alone teaches its router nothing."
            )
        for router in self.routers:
            width = len(self.allowed(router))
            if width < self.top_k:
                lower = "" if width < 2 else f"set moe.top_k to at most {width}, or "
                raise UserError(
                    f"moe.top_k is {self.top_k} but the {router} router has only {width} "
                    f"expert{'s' if width > 1 else ''} to choose from: {lower}add experts."
                )

    @classmethod
    def from_variant(
        cls,
        variant: Variant,
        *,
        vision: int | None = None,
        shared: int | None = None,
        text: int | None = None,
        top_k: int = 2,
    ) -> ExpertLayout:
        """The layout of a named system; a count of None takes the paper's four-expert value.

        Raises:
            UserError: A count that contradicts the variant, such as shared experts in Modality MoE.
        """
        given = {"vision": vision, "shared": shared, "text": text}
        defaults = dict(zip(given, _DEFAULT_COUNTS[variant], strict=True))
        counts = {k: defaults[k] if v is None else v for k, v in given.items()}
        must_be_zero = {
            "dense": ("vision", "shared", "text"),
            "vanilla": ("vision", "text"),
            "modality": ("shared",),
            "moiie": (),
        }[variant]
        for group, count in counts.items():
            if group in must_be_zero and count:
                raise UserError(
                    f"moe.num_{group}_experts is {count}, but the {variant} variant has no "
                    f"{group} experts: set it to 0 or choose another moe.variant."
                )
            if group not in must_be_zero and not count:
                raise UserError(
                    f"moe.num_{group}_experts is 0, but the {variant} variant needs {group} "
                    "experts: set it to 1 or more or choose another moe.variant."
                )
        return cls(counts["vision"], counts["shared"], counts["text"], top_k)

    @property
    def num_experts(self) -> int:
        return self.num_vision + self.num_shared + self.num_text

    @property
    def is_dense(self) -> bool:
        return self.num_experts == 0

    @property
    def routers(self) -> tuple[Router, ...]:
        """The routers of a layer: one per modality, or one ``joint`` router in Vanilla MoE."""
        if self.is_dense:
            return ()
        return ("joint",) if self.num_shared == self.num_experts else ("vision", "text")

    def allowed(self, router: Router) -> range:
        """Logical ids of the experts that a router scores, in the order of its weight rows."""
        if router == "joint":
            return range(self.num_experts)
        if router == "vision":
            return range(0, self.num_vision + self.num_shared)
        return range(self.num_vision, self.num_experts)

    def name(self, expert: int) -> str:
        """The expert's name in reports: ``vision.0``, ``shared.1``, ``text.0``."""
        for group, count in (
            ("vision", self.num_vision),
            ("shared", self.num_shared),
            ("text", self.num_text),
        ):
            if expert < count:
                return f"{group}.{expert}"
            expert -= count
        raise IndexError(expert)


def moe_layers(layers: str | list[int], num_layers: int) -> list[int]:
    """Indices (from 0) of the layers that hold experts.

    ``interleaved`` is layers 1, 3, 5, ...; Megatron's ``moe_layer_freq=2`` would be 0, 2, 4.

    Raises:
        UserError: An index outside the model, a repeated one, or an empty list.
    """
    if layers == "interleaved":
        return list(range(1, num_layers, 2))
    if layers == "all":
        return list(range(num_layers))
    assert isinstance(layers, list)
    if not layers or len(set(layers)) != len(layers) or not set(layers) <= set(range(num_layers)):
        raise UserError(
            f"moe.layers is {layers}: use interleaved, all, or distinct layer numbers from 0 to "
            f"{num_layers - 1}."
        )
    return sorted(layers)
