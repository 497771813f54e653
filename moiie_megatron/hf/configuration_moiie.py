"""The ``config.json`` of an exported MoIIE model."""

from __future__ import annotations

from typing import Any, Literal

from .version_moiie import TESTED_VERSIONS  # noqa: F401  # first: older versions lack names below

# isort: split

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, configuration_utils

# What the model reads from the two configurations inside.
TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "hidden_act",
    "rms_norm_eps",
)
VISION_KEYS = ("hidden_size", "num_hidden_layers", "image_size", "patch_size")


# transformers 5.19 does not have it.
_SPEC: Any = getattr(configuration_utils, "SubConfigSpec", None)


def _sub_configs_defaults() -> dict[str, Any]:
    """What is inside: of the family that its ``model_type`` names; there is no default."""
    if _SPEC is None:
        return {}

    class Given(_SPEC):
        def __init__(self) -> None:
            super().__init__(config_class=AutoConfig, model_type="")

        def default_config_fields(self) -> dict[str, Any]:
            return {}

    return {"text_config": Given(), "vision_config": Given()}


def _built(key: str, given: Any) -> PreTrainedConfig:
    """A configuration inside, as later versions of transformers build it."""
    if isinstance(given, PreTrainedConfig):
        return given
    values = dict(given or {})
    kind = values.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"{key}.model_type is {kind}: name a model of transformers.")
    return CONFIG_MAPPING[kind](**values)


class MoiieConfig(PreTrainedConfig):
    """A dense decoder with experts in some layers, a vision encoder and a connector.

    Expert ids count vision experts first, then shared, then text.  The text router scores shared
    and text experts, the vision router vision and shared experts; where all experts are shared
    (Vanilla MoE) one router serves every token.

    Args:
        text_config: Configuration of a dense decoder in transformers, or the same as a dict with
            its ``model_type``.
        vision_config: The same of a vision encoder.
        experts: Sizes of the groups, ``{"vision": 1, "shared": 2, "text": 1}``.
        num_experts_per_tok: Experts per token.  Not called ``top_k``, which transformers would take
            for a setting of sampling.
        moe_layers: Layers (from 0) with experts; empty for a dense model.
        router_dtype: Router scores are computed in ``float32`` or in the dtype of the ``model``.
        image_token_id: Stands at image positions.  In exports of earlier versions it may lie
            outside the vocabulary.
        num_added_tokens: Tokens up to ``image_token_id`` that the trained model does not have;
            they are never generated.
        num_image_tokens: Per image; default: one per patch.
        vision_feature_layer: Index into the vision encoder's hidden states.
        connector_hidden_size: Default: the text model's hidden size.
        last_image_token_as_text: The last image token of every run uses the text router, as in the
            reference implementation (commit c614868), which looks at the type of the next token.
        output_router_logits: Return the scores of every MoE layer by default.
        tie_word_embeddings: Default: as ``text_config`` says.

    Raises:
        ValueError: A model of another kind, or experts and layers that do not fit together.
    """

    model_type = "moiie"
    if _SPEC is None:
        sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
        has_no_defaults_at_init = True
    else:
        sub_configs_defaults = _sub_configs_defaults()

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    experts: dict[str, int] | None = None
    num_experts_per_tok: int = 2
    moe_layers: list[int] | tuple[int, ...] = ()
    router_dtype: Literal["float32", "model"] = "float32"
    image_token_id: int | None = None
    num_added_tokens: int = 0
    num_image_tokens: int | None = None
    vision_feature_layer: int = -2
    connector_hidden_size: int | None = None
    last_image_token_as_text: bool = False
    output_router_logits: bool = False
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if "top_k" in kwargs:
            raise ValueError(
                f"top_k is {kwargs['top_k']}: write it as num_experts_per_tok, transformers would "
                "sample from so many tokens."
            )
        if _SPEC is None:
            self.text_config = _built("text_config", self.text_config)
            self.vision_config = _built("vision_config", self.vision_config)
        super().__post_init__(**kwargs)
        text, vision = self.text_config, self.vision_config
        for key, config, needed in (
            ("text_config", text, TEXT_KEYS),
            ("vision_config", vision, VISION_KEYS),
        ):
            missing = [name for name in needed if not hasattr(config, name)]
            if missing:
                raise ValueError(
                    f"{key}.model_type is {config.model_type}, which has no {missing[0]}: use a "
                    f"model that has {', '.join(needed)}."
                )
        vision.vision_use_head = False  # only patch features are used
        if self.num_image_tokens is None:
            self.num_image_tokens = self.num_patches
        if self.connector_hidden_size is None:
            self.connector_hidden_size = text.hidden_size
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = text.tie_word_embeddings
        text.tie_word_embeddings = self.tie_word_embeddings
        self.experts = {"vision": 0, "shared": 0, "text": 0} | (self.experts or {})
        self.moe_layers = sorted(self.moe_layers)
        self._check_experts()
        if self.moe_layers:  # vLLM, and quantisation by transformers, look for them there
            text.num_experts = self.num_experts
            text.num_experts_per_tok = self.num_experts_per_tok

    def _check_experts(self) -> None:
        if self.router_dtype not in ("float32", "model"):
            raise ValueError(f"router_dtype is {self.router_dtype}: use float32 or model.")
        if not self.moe_layers:
            return
        last = self.text_config.num_hidden_layers - 1
        if not set(self.moe_layers) <= set(range(last + 1)):
            raise ValueError(
                f"moe_layers is {self.moe_layers}: use numbers from 0 to {last}, the layers of "
                "text_config."
            )
        narrowest = min(len(ids) for ids in self.routers.values())
        if not 1 <= self.num_experts_per_tok <= narrowest:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, but with experts "
                f"{self.experts} a router has {narrowest} to choose from: lower it or add experts."
            )

    @property
    def num_patches(self) -> int:
        """Positions of the vision encoder that stand for a part of the image."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def num_experts(self) -> int:
        """Experts of one layer, of all groups."""
        return sum(self.experts.values())

    @property
    def routers(self) -> dict[str, range]:
        """The experts that each router scores, by the name of its weights.

        ``gate`` is for text and ``gate_vis`` for images; ``gate`` is the only one if all experts
        are shared.
        """
        vision, total = self.experts["vision"], self.num_experts
        if self.experts["shared"] == total:
            return {"gate": range(total)}
        return {
            "gate": range(vision, total),
            "gate_vis": range(vision + self.experts["shared"]),
        }
