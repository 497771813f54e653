"""Token types in the layers that ``recompute_method: block`` does not recompute."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from moiie_megatron.mcore.patches.patch import Patch


def pass_token_types_to_all_layers(decoder: Any) -> None:
    """Let a built ``TransformerBlock`` call every layer with ``padding_mask``.

    Newer versions of Megatron-Core do so, and have no such method.
    """
    checkpointed_forward = getattr(decoder, "_checkpointed_forward", None)
    if checkpointed_forward is None:
        return

    def forward(*args: Any, padding_mask: Tensor | None = None, **kwargs: Any) -> Any:
        def fill_in(_: Any, layer_args: Any, layer_kwargs: dict[str, Any]) -> Any:
            if layer_kwargs["padding_mask"] is None:
                layer_kwargs["padding_mask"] = padding_mask
            return layer_args, layer_kwargs

        # A recomputed layer has the token types among the inputs of its checkpoint, from which it
        # is replayed; the others run once, inside this call.
        hooks = [
            layer.register_forward_pre_hook(fill_in, with_kwargs=True) for layer in decoder.layers
        ]
        try:
            return checkpointed_forward(*args, padding_mask=padding_mask, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    decoder._checkpointed_forward = forward


PATCHES: Final = (
    Patch(
        name="token types with block recompute",
        targets=(
            "megatron.core.transformer.transformer_block.TransformerBlock._checkpointed_forward",
        ),
        reason="With recompute_method=block it calls the layers that are not recomputed without "
        "padding_mask, which carries the token types.",
        versions=("0.16",),
    ),
)
