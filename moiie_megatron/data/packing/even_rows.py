"""Rows that exchange samples until they fit and are even in tokens and in images.

A row that is too long, or else the fullest one, gives up to two samples to another row for up to
two of its samples, in the way that evens the two most.  All numbers are integers, so every process
computes the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, combinations, islice
from typing import Final

import numpy as np

# Rows with which one exchanges samples, the emptiest: to fit, and to be even.
_PARTNERS_TO_FIT: Final = 64
_PARTNERS_TO_EVEN: Final = 16
_CHOICES: Final = 22  # ways to take up to two samples from a row; six samples have so many


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
        self.rows = [list(row) for row in rows]
        self.tokens = np.array([self._total(lengths, row) for row in self.rows], np.int64)
        self.images = np.array([self._total(images, row) for row in self.rows], np.int64)
        # What a row can give, listed when it is first needed: nothing first, and padded with it.
        self._choices: list[list[tuple[int, ...]]] = [[]] * len(rows)
        self._choice_tokens = np.zeros((len(rows), _CHOICES), np.int64)
        self._choice_images = np.zeros((len(rows), _CHOICES), np.int64)

    @property
    def fits(self) -> bool:
        """Whether no row exceeds the capacity."""
        return int(self.tokens.max()) <= self._capacity

    def shorten(self, num_exchanges: int) -> None:
        """Even the tokens of rows that are too long, the longest first."""

        def too_long() -> np.ndarray:
            return np.where(self.tokens > self._capacity, self.tokens, -1)

        self._repeat(num_exchanges, too_long, _PARTNERS_TO_FIT, image_weight=0)

    def even_out(self, num_exchanges: int) -> None:
        """Even tokens and images, the fullest row first; rows that fit go on to fit."""
        self._repeat(num_exchanges, self._squares, _PARTNERS_TO_EVEN, self._image_weight)

    def _repeat(
        self, count: int, sizes: Callable[[], np.ndarray], partners: int, image_weight: int
    ) -> None:
        """Exchange from the row of the largest size on, until none with a size >= 0 is left."""
        stuck = np.zeros(len(self.rows), bool)
        for _ in range(count):
            left = np.where(stuck, -1, sizes())
            row = int(left.argmax())
            if left[row] < 0:
                return
            if self._exchange(row, partners, image_weight):
                stuck[:] = False
            else:
                stuck[row] = True

    def _squares(self) -> np.ndarray:
        return self.tokens**2 + self._image_weight * self.images**2

    def _exchange(self, row: int, partners: int, image_weight: int) -> bool:
        """Exchange samples with another row so that the sum of squares falls most.

        Returns:
            Whether there was such an exchange.
        """
        others = np.argsort(self._squares(), kind="stable")[: partners + 1]
        others = others[others != row]
        for one in (row, *others):
            if not self._choices[one]:
                self._list_choices(one)
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
        for one, out, back in ((row, given, taken), (other, taken, given)):
            self.rows[one] = [i for i in self.rows[one] if i not in out] + list(back)
            self.tokens[one] = self._total(self._sample_tokens, self.rows[one])
            self.images[one] = self._total(self._sample_images, self.rows[one])
            self._choices[one] = []

    def _list_choices(self, row: int) -> None:
        none_one_or_two = chain(*(combinations(self.rows[row], number) for number in range(3)))
        choices = list(islice(none_one_or_two, _CHOICES))
        self._choices[row] = choices
        for counts, of_samples in (
            (self._choice_tokens, self._sample_tokens),
            (self._choice_images, self._sample_images),
        ):
            counts[row] = 0
            counts[row, : len(choices)] = [self._total(of_samples, one) for one in choices]

    @staticmethod
    def _total(of_samples: Sequence[int], samples: Sequence[int]) -> int:
        return sum([of_samples[i] for i in samples])
