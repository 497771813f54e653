"""The key-value cache: Megatron-Core's static inference context, for rows of different lengths.

Megatron's own static batching keeps one offset for the whole batch: all rows begin with as many
tokens as the shortest prompt and then read the rest of theirs one by one, which image tokens
cannot do.  Here every row has its own length, and a key's place in the cache is its position.

Shape letters: see ``moe/__init__.py``; b rows of the cache, S positions of the longest row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from moiie_megatron.mcore.attention import causal_attention
from moiie_megatron.mcore.inference.spans import Pass, Span


@dataclass(frozen=True)
class _Step:
    """What the layers need of the spans of a pass that go on by one token.

    Attributes:
        rows: int64 (t,), their rows; None for all rows in order.
        places: int64 (t,), where their tokens are in the pass; None for the first ones in order.
        positions: int64 (t,), of their tokens.
        position: The same as a number, where all are equal.
        keys: The part of the positions that any of them sees.
        mask: ``(t, 1, 1, keys)``, 0 or -inf; None if all see all of that part.
    """

    rows: Tensor | None
    places: Tensor | None
    positions: Tensor
    position: int | None
    keys: slice
    mask: Tensor | None


class KeyValueCache(StaticInferenceContext):
    """The keys and values of a batch of sequences, and the pass that is being computed.

    It reaches the attention of every layer as the ``inference_context`` of ``GPTModel.forward``.
    Keys are stored as they are after the rotary embedding.

    Args:
        rows: b.
        length: S, the most positions that a row can have.
        rotary: The model's rotary embedding.
        window: Positions that a token sees, itself included; None for all before it.
        dtype: Of keys, values and angles.
        device: Where they are.
    """

    def __init__(
        self,
        rows: int,
        length: int,
        rotary: Any,
        *,
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(rows, length)
        self.materialize_only_last_token_logits = False  # the model is told which ones
        self.window = window
        self.dtype = dtype
        self.device = device
        # Longest row that uses the first frequencies (LongRoPE).
        self.switch: int | None = getattr(rotary, "switch", None)
        short = length if self.switch is None else min(length, self.switch)
        self._angles = [self._sines(rotary.get_emb(short))]
        if short < length:
            self._angles.append(self._sines(rotary.get_emb(length)))
        self._pass = Pass((), 1)
        self._step: _Step | None = None
        self._cos: Tensor | None = None
        self._sin: Tensor | None = None

    def outgrows(self, length: int) -> bool:
        """Whether a row of so many positions has other frequencies than the one before.

        Its keys are useless then, and it must begin anew.
        """
        return self.switch is not None and length == self.switch + 1

    def begin(self, work: Pass) -> None:
        """Set the pass that the layers compute next, and what is equal for all of them."""
        self._pass = work
        ones = [
            (offset, span)
            for offset, span in zip(work.offsets, work.spans, strict=True)
            if not span.begins
        ]
        self._step = self._plan_step(ones) if ones else None
        if len(ones) == len(work.spans) and ones:
            self.enable_decode_mode()
        else:
            self.enable_prefill_mode()
        self._cos, self._sin = self._angles_of(work)

    def rotate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary embedding of the tokens of the pass at their positions."""
        return self._rotated(query), self._rotated(key)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> Tensor:
        """Store the keys and values of the pass, and attend to all of their rows.

        Args:
            layer: Megatron's number of the layer.
            query: ``(s, 1, n, d)``, rotated.
            key: ``(s, 1, g, d)``, rotated.
            value: ``(s, 1, g, d)``.
            scale: Factor on the scores; None for ``1 / sqrt(d)``.

        Returns:
            ``(s, 1, n * d)``, 0 at padding.
        """
        keys, values = self._memory(layer, key, value)
        step, work = self._step, self._pass
        s, _, n, d = query.shape
        if step is not None and step.places is None and len(work.spans) == s:
            output = self._continue(step, query, key, value, keys, values, scale)
            return output.view(s, 1, n * d)
        output_snd = query.new_zeros(s, n, d)
        if step is not None:
            places = slice(len(step.positions)) if step.places is None else step.places
            output_snd[places] = self._continue(
                step, query[places], key[places], value[places], keys, values, scale
            )
        for offset, span in zip(work.offsets, work.spans, strict=True):
            if span.begins:
                here = slice(offset, offset + span.length)
                keys[span.row, :, : span.length] = key[here, 0].transpose(0, 1)
                values[span.row, :, : span.length] = value[here, 0].transpose(0, 1)
                attended = causal_attention(
                    query[here], key[here], value[here], window=self.window, scale=scale
                )
                output_snd[here] = attended.view(span.length, n, d)
        return output_snd.view(s, 1, n * d)

    def _continue(
        self,
        step: _Step,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float | None,
    ) -> Tensor:
        """The tokens that go on by one, ``(t, 1, n, d)``: their outputs ``(t, n, d)``."""
        t, _, n, d = query.shape
        g = key.shape[2]
        if step.rows is None and step.position is not None:
            keys[:t, :, step.position] = key[:, 0]
            values[:t, :, step.position] = value[:, 0]
        else:
            rows = torch.arange(t, device=self.device) if step.rows is None else step.rows
            keys[rows, :, step.positions] = key[:, 0]
            values[rows, :, step.positions] = value[:, 0]
        if step.rows is not None:
            keys, values = keys[step.rows], values[step.rows]
        # The heads that share a key are the queries of one head, so that no key is copied.
        output = F.scaled_dot_product_attention(
            query.view(t, g, n // g, d),
            keys[:, :, step.keys],
            values[:, :, step.keys],
            attn_mask=step.mask,
            scale=scale,
        )
        return output.reshape(t, n, d)

    def _memory(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, ``(b, g, S, d)``; zeros before the first pass.

        Not left uninitialised: what is masked is multiplied with 0, which does not remove a NaN.
        """
        if layer not in self.key_value_memory_dict:
            self.key_value_memory_dict[layer] = tuple(
                tensor.new_zeros(
                    self.max_batch_size,
                    tensor.shape[2],
                    self.max_sequence_length,
                    tensor.shape[3],
                )
                for tensor in (key, value)
            )
        keys, values = self.key_value_memory_dict[layer]
        return keys, values

    def _plan_step(self, ones: list[tuple[int, Span]]) -> _Step:
        rows, positions = [span.row for _, span in ones], [span.start for _, span in ones]
        places = [offset for offset, _ in ones]
        first, last = min(positions), max(positions)
        begin = 0 if self.window is None else max(0, first - self.window + 1)
        mask = None
        at = torch.tensor(positions, device=self.device)
        if first != last:
            seen = torch.arange(begin, last + 1, device=self.device)
            is_hidden = seen > at[:, None]
            if self.window is not None:
                is_hidden |= seen <= at[:, None] - self.window
            mask = torch.zeros(is_hidden.shape, dtype=self.dtype, device=self.device)
            mask = mask.masked_fill_(is_hidden, float("-inf"))[:, None, None]
        every_row = rows == list(range(self.max_batch_size))
        in_order = places == list(range(len(places)))
        return _Step(
            rows=None if every_row else torch.tensor(rows, device=self.device),
            places=None if in_order else torch.tensor(places, device=self.device),
            positions=at,
            position=first if first == last else None,
            keys=slice(begin, last + 1),
            mask=mask,
        )

    def _angles_of(self, work: Pass) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the tokens of the pass, ``(s, 1, 1, d)``; any at padding."""
        places = [
            position
            for span in work.spans
            for position in (*range(span.start, span.stop), *[0] * span.gap)
        ]
        places += [0] * (work.width - len(places))
        positions = torch.tensor(places, device=self.device)
        short = self._angles[0]
        if len(self._angles) == 1:
            return short[0].index_select(0, positions), short[1].index_select(0, positions)
        assert self.switch is not None
        lengths = [span.length + span.gap for span in work.spans]
        lengths.append(work.width - sum(lengths))
        is_long = torch.tensor([span.stop > self.switch for span in work.spans] + [False])
        is_long_s = is_long.repeat_interleave(torch.tensor(lengths)).to(self.device)
        in_short = positions.clamp(max=self.switch - 1)
        cos, sin = (
            torch.where(
                is_long_s.view(-1, 1, 1, 1),
                long.index_select(0, positions),
                table.index_select(0, in_short),
            )
            for table, long in zip(*self._angles, strict=True)
        )
        return cos, sin

    def _sines(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of angles ``(positions, 1, 1, d)``."""
        angles = angles.to(self.device)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def _rotated(self, tensor: Tensor) -> Tensor:
        assert self._cos is not None and self._sin is not None, "begin() comes first"
        first, second = tensor.chunk(2, dim=-1)
        return tensor * self._cos + torch.cat((-second, first), dim=-1) * self._sin
