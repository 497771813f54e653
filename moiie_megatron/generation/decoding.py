"""The forward passes of a batch of prompts: each whole once, then one token of each at a time.

Shapes: b prompts of this replica, s tokens of a pass (``mcore/inference/spans.py``), h hidden
size, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.generation.prompt import Prompt
from moiie_megatron.layout.token_types import IMAGE, PADDING, TEXT
from moiie_megatron.mcore.config import torch_dtype
from moiie_megatron.mcore.inference.cache import KeyValueCache
from moiie_megatron.mcore.inference.spans import Pass, Span, common_width
from moiie_megatron.mcore.inference.stages import receive_hidden, send_hidden
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.vlm.image_split import pixels_of_rank
from moiie_megatron.vlm.model import MoIIEModel


class Decoding:
    """A batch of prompts on all data-parallel replicas, and the cache of this one's.

    Every rank makes the same calls: experts and pipeline stages of other ranks take part in each
    pass, also those of a replica that has nothing left to do.  So how many tokens a pass has
    follows from the lengths of all prompts, which all ranks know, without a message.

    Args:
        config: The run.
        context: The process groups that ``model`` was built with.
        model: This stage of it, in evaluation mode.
        prompts: All of them; replica r has the prompts r, r + DP, r + 2 DP, ...
        max_new_tokens: Most tokens that are appended to a prompt.

    Attributes:
        own: Numbers of this replica's prompts.
    """

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        model: MoIIEModel,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
    ) -> None:
        self._config, self._context, self._model = config, context, model
        replicas = [prompts[rank :: context.dp_size] for rank in range(context.dp_size)]
        self.own = range(context.dp_rank, len(prompts), context.dp_size)
        self._prompts = replicas[context.dp_rank]
        self._lengths = [[len(prompt.tokens) for prompt in part] for part in replicas]
        self._new: list[list[int]] = [[] for _ in self._prompts]
        self._passes = 0
        window = config.language.sliding_window
        self._cache = KeyValueCache(
            len(self._prompts),
            max(map(len, (prompt.tokens for prompt in prompts))) + max_new_tokens,
            model.language_model.rotary_pos_emb,
            window=window,
            dtype=torch_dtype(config),
            device=context.device.torch_device,
        )

    @torch.no_grad()
    def forward(self) -> Tensor | None:
        """Compute what has been appended since the last pass, at first the prompts.

        Returns:
            Logits of the next token of every prompt of this replica, ``(b, V)``; None before the
            last pipeline stage.
        """
        spans = [self._spans(lengths) for lengths in self._lengths]
        parallel = self._config.parallel
        parts = parallel.tensor if parallel.sequence_parallel else 1
        work = Pass(spans[self._context.dp_rank], common_width(spans, parts))
        self._passes += 1
        self._cache.begin(work)
        context, model = self._context, self._model
        if not context.is_first_stage:
            shape = (work.width // parts, 1, self._config.language.hidden_size)
            received = receive_hidden(shape, torch_dtype(self._config), context)
            model.set_input_tensor(received)
        output: Tensor = model(**self._inputs(work), inference_context=self._cache)
        if not context.is_last_stage:
            send_hidden(output, context)
            return None
        return output[0]

    def append(self, ids: Sequence[int]) -> None:
        """The token that follows each of this replica's prompts."""
        for row, token in zip(self._new, ids, strict=True):
            row.append(token)

    def _spans(self, lengths: Sequence[int]) -> tuple[Span, ...]:
        """What the next pass computes of the prompts of a replica."""
        # Runs of image tokens of two prompts must not look like one (vlm/last_image_token.py).
        gap = int(self._config.moe.last_image_token_as_text)
        spans = []
        for row, prompt in enumerate(lengths):
            length = prompt + self._passes
            if self._passes == 0 or self._cache.outgrows(length):
                spans.append(Span(row, 0, length, gap))
            else:
                spans.append(Span(row, length - 1, length))
        return tuple(spans)

    def _inputs(self, work: Pass) -> dict[str, Tensor | None]:
        """The arguments of the model for a pass."""
        parts = [self._part(span) for span in work.spans]
        tokens = list(chain.from_iterable(tokens for tokens, _ in parts))
        types = list(chain.from_iterable(types for _, types in parts))
        missing = work.width - len(tokens)
        tokens += [0] * missing
        types += [PADDING] * missing
        move, images, image_positions = self._context.device.copy, None, None
        if self._context.is_first_stage:
            begun = [self._prompts[span.row].images for span in work.spans if span.begins]
            if any(map(len, begun)):
                images = pixels_of_rank(torch.cat(begun), self._config.vision, self._context)
            is_image = [place for place, kind in enumerate(types) if kind == IMAGE]
            image_positions = move(torch.tensor(is_image, dtype=torch.int64))
        tokens_1s = move(torch.tensor([tokens]))
        return {
            "tokens": tokens_1s,
            "position_ids": tokens_1s,  # of absolute embeddings, which no family has
            "token_types": move(torch.tensor([types], dtype=torch.int8)),
            "images": images,
            "image_positions": image_positions,
            "label_positions": move(torch.tensor(work.last_places, dtype=torch.int64)),
        }

    def _part(self, span: Span) -> tuple[list[int], list[int]]:
        """Tokens and types of a span, with the padding behind it."""
        new = self._new[span.row]
        if not span.begins:
            return [new[-1]], [TEXT]
        prompt, gap = self._prompts[span.row], span.gap
        return (
            [*prompt.tokens.tolist(), *new, *[0] * gap],
            [*prompt.token_types.tolist(), *[TEXT] * len(new), *[PADDING] * gap],
        )
