"""Which experts a trained MoIIE model in Hugging Face files has.

Our exports say so in ``config.json``.  Checkpoints of the reference (github.com/AlenjandroWang/
MoIIE, commit c614868) do not: there the weights are counted.  Every MoE layer has ``mlp.gate``,
``mlp.gate_vis`` and ``mlp.experts.{i}``, each router as wide as the number of experts it scores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moiie_megatron.config.messages import first_problem
from moiie_megatron.config.schema import MoEConfig
from moiie_megatron.convert.hf.config import read_config
from moiie_megatron.convert.hf.name_layouts import open_language
from moiie_megatron.convert.hf.weights_source import WeightsSource
from moiie_megatron.utils.errors import UserError

EXPORT = "moiie"  # model_type of our exports
_EXPERT = re.compile(r"\.layers\.(\d+)\.mlp\.experts\.(\d+)\.")

Groups = tuple[int, int, int]  # vision, shared, text


@dataclass(frozen=True)
class TrainedExperts:
    """The experts of a directory.

    Attributes:
        moe: The run's section; dense where the directory has none.
        is_reference: They were named by the reference's code, not by our exporter.
        ignored: Regular expressions of experts that no router ever chooses.
    """

    moe: MoEConfig
    is_reference: bool
    ignored: tuple[str, ...] = ()


def read_trained_experts(
    directory: str | Path, num_layers: int, groups: Groups | None = None
) -> TrainedExperts:
    """The experts of an export, of a checkpoint of the reference, or none.

    Args:
        num_layers: Of the language model.
        groups: What the experts of the reference's checkpoint are, where that is not clear.

    Raises:
        UserError: Weights or ``config.json`` are unreadable or contradict each other, or
            ``groups`` is needed or does not fit.
    """
    _, given = read_config(directory)
    source, _ = open_language(directory)
    found = _find_experts(source)
    if given.get("model_type") == EXPORT:
        if groups is not None:
            raise UserError(
                f"{directory} is an export, whose config.json knows its experts: leave out the "
                f"{','.join(map(str, groups))}."
            )
        return TrainedExperts(_exported(directory, given, found, num_layers), is_reference=False)
    if not found:
        return TrainedExperts(_dense(), is_reference=False)
    return _reference(directory, given, found, num_layers, groups, source)


def _exported(
    directory: str | Path, given: Mapping[str, Any], found: Mapping[int, int], num_layers: int
) -> MoEConfig:
    layers, sizes = given.get("moe_layers") or [], given.get("experts") or {}
    if layers != list(found):
        raise UserError(
            f"{directory} has experts in layers {list(found)} but its config.json means "
            f"{layers}: use the weights that belong to it."
        )
    if not layers:
        return _dense()
    values = {
        **_groups(tuple(sizes.get(name, 0) for name in ("vision", "shared", "text"))),
        "layers": _layers(layers, num_layers),
        "top_k": given.get("num_experts_per_tok"),
        "router_dtype": {"float32": "fp32"}.get(given.get("router_dtype", ""), "model"),
        "last_image_token_as_text": bool(given.get("last_image_token_as_text")),
    }
    return _section(values, directory)


def _reference(
    directory: str | Path,
    given: Mapping[str, Any],
    found: Mapping[int, int],
    num_layers: int,
    groups: Groups | None,
    source: WeightsSource,
) -> TrainedExperts:
    shapes = {layer: _Shape.of(layer, count, source) for layer, count in found.items()}
    shape = next(iter(shapes.values()))
    if set(shapes.values()) != {shape}:
        counts = ", ".join(f"{s.experts} in layer {layer}" for layer, s in shapes.items())
        raise UserError(
            f"The layers of {directory} have different numbers of experts or router rows "
            f"({counts}): copy the checkpoint again."
        )
    groups = shape.groups(directory, groups)
    values = {
        **_groups(groups),
        "layers": _layers(sorted(found), num_layers),
        "top_k": given.get("num_experts_per_tok", 2),
        # Its routers compute in the dtype of the model, and its balance loss pools the layers.
        "router_dtype": "model",
        "aux_loss": "pooled",
        "vision_aux_loss_coeff": given.get("vis_router_aux_loss_coef", 0.001),
        "text_aux_loss_coeff": given.get("lan_router_aux_loss_coef", 0.001),
    }
    unused = range(sum(groups), shape.experts)
    ignored = tuple(rf"\.mlp\.experts\.{expert}\." for expert in unused)
    return TrainedExperts(_section(values, directory), is_reference=True, ignored=ignored)


@dataclass(frozen=True)
class _Shape:
    """One layer of the reference: its experts and the rows of its routers (0: no router)."""

    experts: int
    text: int
    vision: int

    @classmethod
    def of(cls, layer: int, experts: int, source: WeightsSource) -> _Shape:
        rows = []
        for router in ("gate", "gate_vis"):
            end = f".layers.{layer}.mlp.{router}.weight"
            name = next((n for n in source.names if n.endswith(end)), None)
            rows.append(0 if name is None else source.shape(name)[0])
        return cls(experts, *rows)

    def groups(self, directory: str | Path, groups: Groups | None) -> Groups:
        """The groups that these rows mean, or the given ones if they fit."""
        candidates = self._candidates()
        texts = [",".join(map(str, candidate)) for candidate in candidates]
        if groups is not None and groups not in candidates:
            raise UserError(
                f"The experts {','.join(map(str, groups))} do not fit {directory}, which has "
                f"{self.experts} experts and routers with {self.vision} (vision) and {self.text} "
                f"(text) rows: use {' or '.join(texts)}."
            )
        if groups is None and len(candidates) > 1:
            raise UserError(
                f"The {self.experts} experts in {directory} can be two things: give --experts "
                f"{texts[1]} if the reference's code trained it as it is published (it never uses "
                f"the last ones), or {texts[0]} if its offset was corrected."
            )
        return groups or candidates[0]

    def _candidates(self) -> list[Groups]:
        """What these rows can mean, the paper's rule first."""
        if not self.vision:
            return [(0, self.experts, 0)]
        shared = self.text + self.vision - self.experts
        paper = (self.experts - self.text, shared, self.experts - self.vision)
        if not shared or self.text != self.vision:
            return [paper]
        # The published code's text router always starts at expert 1, so that of 8 experts the
        # last is never used.  With 4 experts that is the same.
        return list(dict.fromkeys([paper, (1, self.vision - 1, 1)]))


def _find_experts(source: WeightsSource) -> dict[int, int]:
    """Number of experts by layer."""
    counts: dict[int, int] = {}
    for name in source.names:
        match = _EXPERT.search(name)
        if match is not None:
            layer, expert = int(match[1]), int(match[2])
            counts[layer] = max(counts.get(layer, 0), expert + 1)
    return dict(sorted(counts.items()))


def _groups(groups: tuple[int, ...]) -> dict[str, Any]:
    vision, shared, text = groups
    variant = "vanilla" if not vision + text else "modality" if not shared else "moiie"
    return {
        "variant": variant,
        "num_vision_experts": vision,
        "num_shared_experts": shared,
        "num_text_experts": text,
    }


def _dense() -> MoEConfig:
    return MoEConfig(
        variant="dense", num_vision_experts=0, num_shared_experts=0, num_text_experts=0
    )


def _layers(layers: list[int], num_layers: int) -> str | list[int]:
    """``moe.layers``, by its name where it has one."""
    names = {"all": range(num_layers), "interleaved": range(1, num_layers, 2)}
    return next((name for name, which in names.items() if layers == list(which)), layers)


def _section(values: dict[str, Any], directory: str | Path) -> MoEConfig:
    try:
        moe = MoEConfig(**values)
    except ValidationError as error:
        raise UserError(
            f"{Path(directory) / 'config.json'} does not describe experts: "
            f"{first_problem(error, MoEConfig)}"
        ) from None
    _ = moe.layout  # refuses numbers that do not fit the variant
    return moe
