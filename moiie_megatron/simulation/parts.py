"""Which part of the model, and which pass, an operation belongs to."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch

from moiie_megatron.moe.layer import MoIIELayer
from moiie_megatron.planning.trace import Part, Pass
from moiie_megatron.vlm.model import MoIIEModel

_OF_LAYER: Final[dict[str, Part]] = {
    "input_layernorm": "attention",
    "self_attention": "attention",
    "pre_mlp_layernorm": "dense_ffn",
    "mlp": "dense_ffn",
}


@dataclass
class _Running:
    """A module that is running.

    Attributes:
        part: What its own operations belong to now.
        is_container: Whether that is the part that it has left last, as for residual additions.
    """

    part: Part
    when: Pass
    is_container: bool


class PartTracker:
    """While it is entered, follows the modules of a model through forward and backward.

    In the forward pass a part begins where its module begins.  In the backward pass the node of
    autograd that is running tells by its sequence number in which part it was made.

    Args:
        chunks: The model of one rank.
    """

    def __init__(self, chunks: Iterable[MoIIEModel]) -> None:
        self._chunks = list(chunks)
        self._hooks: list[Any] = []
        # Parts by the sequence numbers of autograd where they begin, in rising order.
        self._starts: list[int] = [-1]
        self._parts: list[Part] = ["other"]
        self._stack: list[_Running] = []
        self._outside: tuple[Part, Pass] = ("optimizer", "update")
        self._forwards = self._backwards = 0
        self._was_backward = False

    def __enter__(self) -> PartTracker:
        for chunk in self._chunks:
            self._hook(chunk, "other", is_chunk=True)
            for module, part, is_container in _modules(chunk):
                self._hook(module, part, is_container=is_container)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextmanager
    def between(self, part: Part, when: Pass) -> Iterator[None]:
        """What runs within the block, outside modules and autograd, belongs to this."""
        before, self._outside = self._outside, (part, when)
        try:
            yield
        finally:
            self._outside = before

    def now(self) -> tuple[Part, Pass]:
        """The part and pass of the operation that is running."""
        if self._stack:
            running = self._stack[-1]
            return running.part, running.when
        node = torch._C._current_autograd_node()
        if self._was_backward != (node is not None):
            self._was_backward = node is not None
            self._backwards += self._was_backward
        if node is None:
            return self._outside
        part = self._parts[bisect.bisect_right(self._starts, node._sequence_nr()) - 1]
        # The backward of a checkpoint itself runs the forward pass again.
        return part, "recompute" if "Checkpoint" in node.name() else "backward"

    def micro_batch(self, when: Pass) -> int:
        """Number of the forward or backward pass of a chunk that is running, from 0."""
        return max((self._forwards if when == "forward" else self._backwards) - 1, 0)

    def _hook(
        self,
        module: torch.nn.Module,
        part: Part,
        *,
        is_container: bool = False,
        is_chunk: bool = False,
    ) -> None:
        def enter(*_: Any) -> None:
            is_replay = torch._C._current_autograd_node() is not None
            self._forwards += is_chunk and not is_replay
            when: Pass = "recompute" if is_replay else "forward"
            self._stack.append(_Running(part, when, is_container))
            self._begin(part)

        def leave(*_: Any) -> None:
            left = self._stack.pop()
            if self._stack:
                around = self._stack[-1]
                if around.is_container:
                    around.part = left.part
                self._begin(around.part)
            else:
                self._begin("other")

        self._hooks += [
            module.register_forward_pre_hook(enter),
            # Also where a replay ends early, with an exception.
            module.register_forward_hook(leave, always_call=True),
        ]

    def _begin(self, part: Part) -> None:
        """Nodes of autograd that are made from now on belong to a part."""
        start = torch.autograd._get_sequence_nr()
        if self._starts[-1] == start:
            self._parts[-1] = part
        elif self._parts[-1] != part:
            self._starts.append(start)
            self._parts.append(part)


def _modules(chunk: MoIIEModel) -> Iterator[tuple[torch.nn.Module, Part, bool]]:
    """The modules of a chunk with their parts, and which of them only contain others."""
    if chunk.vision_encoder is not None and chunk.connector is not None:
        yield chunk.vision_encoder, "vision", False
        for layer in chunk.vision_encoder.model.encoder.layers:
            yield layer, "vision", False
        yield chunk.connector, "connector", False
    language = chunk.language_model
    # Its own operations are those around logits and cross-entropy.
    yield language, "output_layer", False
    yield language.decoder, "other", True
    ends: tuple[tuple[str, Part], ...] = (
        ("embedding", "embedding"),
        ("output_layer", "output_layer"),
    )
    for name, part in ends:
        if hasattr(language, name):
            yield getattr(language, name), part, False
    if getattr(language.decoder, "final_layernorm", None) is not None:
        yield language.decoder.final_layernorm, "output_layer", False
    for layer in language.decoder.layers:
        yield layer, "attention", True
        has_experts = isinstance(layer.mlp, MoIIELayer)
        for name, part in _OF_LAYER.items():
            in_experts = has_experts and part == "dense_ffn"
            yield getattr(layer, name), "dispatch" if in_experts else part, False
        if has_experts:
            yield layer.mlp.router, "router", False
            yield layer.mlp.experts, "experts", False
