"""Which experts a token chooses together, where only the load of each expert is known.

Of all distributions of top-k sets with given loads this is the one of maximum entropy: a set's
probability is proportional to the product of its experts' weights (conditional Poisson sampling;
Chen, Dempster and Liu 1994, "Weighted finite population sampling to maximize entropy").  With
equal loads all sets are equally probable.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import count
from math import isqrt
from typing import Final, Protocol

import numpy as np

_CERTAIN: Final = 1e-6  # a load this close to 0 or 1 is taken as it
_TOLERANCE: Final = 1e-9  # of loads
_FIXED_POINT_STEPS: Final = 50
_NEWTON_STEPS: Final = 100
_MAX_LOG_STEP: Final = 5.0  # of the logarithm of a weight


class UniformNumbers(Protocol):
    """Where a sample takes its numbers from; numpy's ``Generator`` is one."""

    def random(self, size: int) -> np.ndarray:
        """Numbers from 0 up to 1, independent of those of other calls."""


class EvenNumbers:
    """Numbers that fill [0, 1) evenly, those of several calls together the cube.

    Multiples of square roots of different primes, modulo 1 (a Kronecker sequence): counts differ
    from their expectation by a few instead of by the root of their number.
    """

    def __init__(self) -> None:
        self._primes = (n for n in count(2) if all(n % d for d in range(2, isqrt(n) + 1)))

    def random(self, size: int) -> np.ndarray:
        """The next coordinate of the first ``size`` points."""
        return np.asarray((np.arange(size) * np.sqrt(next(self._primes))) % 1.0)


class TopKChoice:
    """The joint distribution of a token's experts.

    Args:
        loads: For every expert the probability that a token chooses it; they add up to a whole
            number, the top-k.
    """

    def __init__(self, loads: tuple[float, ...]) -> None:
        self._loads_E = np.array(loads, float)
        self.top_k = round(float(self._loads_E.sum()))
        assert abs(self._loads_E.sum() - self.top_k) < _CERTAIN * max(len(loads), 1), loads
        self._is_certain_E = self._loads_E > 1 - _CERTAIN
        self._open_k = self.top_k - int(self._is_certain_E.sum())
        self._is_open_E = ~self._is_certain_E & (self._loads_E > _CERTAIN) & (self._open_k > 0)
        # Without those that are certain the others add up to a whole number, but for rounding.
        open_E = self._loads_E[self._is_open_E]
        open_E = open_E * (self._open_k / max(float(open_E.sum()), _CERTAIN))
        open_E = np.minimum(open_E, 1 - _CERTAIN / 10)
        self._weights_E = np.zeros(len(loads))
        self._weights_E[self._is_open_E] = _weights(open_E, self._open_k)

    def any_of(self, experts: Iterable[int]) -> float:
        """The probability that a token chooses one or more of these experts."""
        chosen = list(experts)
        if self._is_certain_E[chosen].any():
            return 1.0
        others = self._weights_E.copy()
        others[chosen] = 0
        k = self._open_k
        return float(1 - _set_sums(others, k)[k] / _set_sums(self._weights_E, k)[k])

    def sample(self, tokens: int, generator: UniformNumbers) -> np.ndarray:
        """Draw a routing map.

        Args:
            tokens: T.
            generator: numpy's, or ``EvenNumbers`` for loads without noise.

        Returns:
            bool (T, E): every token has ``top_k`` experts, drawn apart from other tokens.
        """
        routing_map_TE = np.zeros((tokens, len(self._loads_E)), bool)
        routing_map_TE[:, self._is_certain_E] = True
        left_T = np.full(tokens, self._open_k)
        experts = np.flatnonzero(self._is_open_E)
        # Sums over the sets of the experts that are still to come, by number of experts.
        ahead = [_set_sums(self._weights_E[experts[i:]], self._open_k) for i in range(len(experts))]
        ahead.append(_set_sums(np.zeros(0), self._open_k))
        for i, expert in enumerate(experts):
            with_it = self._weights_E[expert] * np.concatenate([[0.0], ahead[i + 1][:-1]])
            probability = np.divide(
                with_it, ahead[i], out=np.zeros_like(with_it), where=ahead[i] > 0
            )
            chosen_T = generator.random(tokens) < probability[left_T]
            routing_map_TE[:, expert] = chosen_T
            left_T = left_T - chosen_T
        assert not left_T.any()
        return routing_map_TE


@lru_cache(maxsize=1024)  # layers often have the same loads
def top_k_choice(loads: tuple[float, ...]) -> TopKChoice:
    """The distribution for these loads."""
    return TopKChoice(loads)


def _weights(loads_E: np.ndarray, k: int) -> np.ndarray:
    """Weights whose sets of k have these loads.

    The odds of every load are corrected until they fit, which takes few steps for many experts.
    Where it takes long, with few experts and loads near 1, Newton's method goes on: the logarithms
    of the weights minimize a convex function, the negative log-likelihood of the loads.
    """
    if len(loads_E) == k:  # all of them, always
        return np.ones(k)
    logs_E = odds_E = _log_odds(loads_E)
    for _ in range(_FIXED_POINT_STEPS):
        found_E = _loads(np.exp(logs_E), k)
        if np.abs(found_E - loads_E).max() < _TOLERANCE:
            return np.asarray(np.exp(logs_E))
        logs_E = logs_E + odds_E - _log_odds(found_E)
        logs_E = logs_E - logs_E.mean()  # which changes all sets alike
    return _newton(logs_E, loads_E, k)


def _newton(logs_E: np.ndarray, loads_E: np.ndarray, k: int) -> np.ndarray:
    def objective(at_E: np.ndarray) -> float:
        return float(np.log(_set_sums(np.exp(at_E), k)[k]) - loads_E @ at_E)

    for _ in range(_NEWTON_STEPS):
        found_E, covariance_EE = _moments(np.exp(logs_E), k)
        gap_E = loads_E - found_E
        if np.abs(gap_E).max() < _TOLERANCE:
            break
        step_E = np.linalg.lstsq(covariance_EE, gap_E)[0]
        size = min(1.0, _MAX_LOG_STEP / float(np.abs(step_E).max()))
        now, slope = objective(logs_E), float(gap_E @ step_E)
        while objective(logs_E + size * step_E) > now - 1e-4 * size * slope and size > 1e-6:
            size /= 2
        logs_E = logs_E + size * step_E
        logs_E = logs_E - logs_E.mean()
    return np.asarray(np.exp(logs_E))


def _log_odds(loads_E: np.ndarray) -> np.ndarray:
    return np.asarray(np.log(loads_E / (1 - loads_E)))


def _loads(weights_E: np.ndarray, k: int) -> np.ndarray:
    """Loads of experts with these weights."""
    without_E = _set_sums(weights_E * (1 - np.eye(len(weights_E))), k)[:, k - 1]
    return np.asarray(weights_E * without_E / _set_sums(weights_E, k)[k])


def _moments(weights_E: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Loads of experts with these weights, and the covariance of being chosen, (E, E)."""
    total, loads_E = _set_sums(weights_E, k)[k], _loads(weights_E, k)
    all_but_one_EE = 1 - np.eye(len(weights_E))
    together_EE = np.zeros_like(all_but_one_EE)
    if k > 1:
        others_EEE = all_but_one_EE[:, None] * all_but_one_EE[None]
        sums_EE = _set_sums(weights_E * others_EEE, k)[..., k - 2]
        together_EE = np.outer(weights_E, weights_E) * sums_EE / total
    np.fill_diagonal(together_EE, loads_E)
    return loads_E, together_EE - np.outer(loads_E, loads_E)


def _set_sums(weights_E: np.ndarray, k: int) -> np.ndarray:
    """For 0 to k experts: the sum over all sets of so many of the product of their weights.

    Args:
        weights_E: Weights, (..., E).
        k: Largest size of a set.

    Returns:
        (..., k + 1).
    """
    sums = np.zeros((*weights_E.shape[:-1], k + 1))
    sums[..., 0] = 1
    for expert in range(weights_E.shape[-1]):
        sums[..., 1:] = sums[..., 1:] + weights_E[..., expert, None] * sums[..., :-1]
    return sums
