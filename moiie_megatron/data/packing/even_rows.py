"""Rows that exchange samples until they fit and are even in tokens and in images.

A row that is too long, or else the fullest one, gives up to two samples to another row for up to
two of its samples, in the way that evens the two most.  All numbers are integers, so every process
computes the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations, islice
from typing import Final

import numpy as np

_PARTNERS: Final = 32  # the emptiest rows, with which one exchanges samples
_CHOICES: Final = 32  # ways to take up to two samples from a row; more are not looked at


class EvenRows:
    """Rows that exchange samples until they are even.

    Args:
        rows: The indices of the samples of every row, none empty; none becomes empty.
        lengths: Tokens of every sample.
        images: Images of every sample.
        capacity: Maximum number of tokens of a row, which rows may exceed at first.
        num_image_tokens: Positions per image: in sums of squares, so many tokens count as much as
            an image.

    Attributes:
        rows: The indices of the samples of every row.
        tokens: int64 (rows,).
        images: int64 (rows,).
    """

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        lengths: Sequence[int],
        images: Sequence[int],
        capacity: int,
        num_image_tokens: int,
    ) -> None:
        self._sample_tokens = lengths
        self._sample_images = images
        self._capacity = capacity
        self._image_weight = num_image_tokens**2
        num_rows = len(rows)
        self.rows = [list(row) for row in rows]
        self.tokens = np.zeros(num_rows, np.int64)
        self.images = np.zeros(num_rows, np.int64)
        # What a row can give, padded with nothing, the first choice of every row.
        self._choices: list[list[tuple[int, ...]]] = [[]] * num_rows
        self._choice_tokens = np.zeros((num_rows, _CHOICES), np.int64)
        self._choice_images = np.zeros((num_rows, _CHOICES), np.int64)
        for row in range(num_rows):
            self._count(row)

    @property
    def fits(self) -> bool:
        """Whether no row exceeds the capacity."""
        return int(self.tokens.max()) <= self._capacity

    def shorten(self, num_exchanges: int) -> None:
        """Even the tokens of rows that are too long, the longest first."""
        stuck = np.zeros(len(self.rows), bool)
        for _ in range(num_exchanges):
            row = int(np.where(stuck, -1, self.tokens).argmax())
            if stuck[row] or self.tokens[row] <= self._capacity:
                return
            if self._exchange(row, image_weight=0):
                stuck[:] = False
            else:
                stuck[row] = True

    def even_out(self, num_exchanges: int) -> None:
        """Even tokens and images, the fullest row first; rows that fit go on to fit."""
        stuck = np.zeros(len(self.rows), bool)
        for _ in range(num_exchanges):
            row = int(np.where(stuck, -1, self._squares()).argmax())
            if stuck[row]:
                return
            if self._exchange(row, self._image_weight):
                stuck[:] = False
            else:
                stuck[row] = True

    def _squares(self) -> np.ndarray:
        return self.tokens**2 + self._image_weight * self.images**2

    def _exchange(self, row: int, image_weight: int) -> bool:
        """Exchange samples with another row so that the sum of squares falls most.

        Returns:
            Whether there was such an exchange.
        """
        others = np.argsort(self._squares(), kind="stable")[: _PARTNERS + 1]
        others = others[others != row]
        width = max((len(self._choices[other]) for other in others), default=0)
        given = slice(0, len(self._choices[row]))
        # (what the row gives, other rows, what they give)
        tokens = self._choice_tokens[row, given, None, None] - self._choice_tokens[others, :width]
        images = self._choice_images[row, given, None, None] - self._choice_images[others, :width]
        other_tokens = self.tokens[others, None]
        change = tokens * (tokens + (other_tokens - self.tokens[row]))
        if image_weight:
            gap = self.images[others, None] - self.images[row]
            change += image_weight * images * (images + gap)
        fits = other_tokens + tokens <= np.maximum(other_tokens, self._capacity)
        fits &= tokens >= self.tokens[row] - max(self.tokens[row], self._capacity)
        change = np.where(fits, change, 0)
        if not change.size or change.min() >= 0:
            return False
        out, at, back = np.unravel_index(int(change.argmin()), change.shape)
        self._swap(row, int(others[at]), self._choices[row][out], self._choices[others[at]][back])
        return True

    def _swap(self, row: int, other: int, given: tuple[int, ...], taken: tuple[int, ...]) -> None:
        self.rows[row] = [i for i in self.rows[row] if i not in given] + list(taken)
        self.rows[other] = [i for i in self.rows[other] if i not in taken] + list(given)
        self._count(row)
        self._count(other)

    def _count(self, row: int) -> None:
        """Count a row that has changed."""
        samples = self.rows[row]
        none_one_or_two = chain(*(combinations(samples, number) for number in range(3)))
        choices = list(islice(none_one_or_two, _CHOICES))
        self._choices[row] = choices
        for counts, totals, of_samples in (
            (self._choice_tokens, self.tokens, self._sample_tokens),
            (self._choice_images, self.images, self._sample_images),
        ):
            totals[row] = sum(of_samples[i] for i in samples)
            counts[row] = 0
            counts[row, : len(choices)] = [sum(of_samples[i] for i in one) for one in choices]
