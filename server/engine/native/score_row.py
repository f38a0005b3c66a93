"""The scores of one row on a CPU: its largest ones, and draws from it.

In numpy and on one thread. torch's operations on a vocabulary wake a team of threads and wait for
it, which takes longer than most of them, and longest where another thread needs the core.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from server.engine.request import SamplingParams

    Floats = NDArray[np.floating]
    Ids = NDArray[np.intp]
    Weigh = Callable[[Floats], Floats]

LARGEST = float(np.finfo(np.float32).max)
MOST_PROBABLE_MASS = 2.0**32

REACH = 23.0  # a mass rounds to zero below this logarithm: 2^32 · exp(-23) < 1/2
DEPTHS = (7.0, 10.0, math.inf)  # logarithms in which a nucleus is looked for, one after the other
MAX_EXACT = 8192  # tokens whose masses are all computed; of more, they are estimated first
PER_BLOCK = 128  # scores that are looked at together; their weights are summed in fp32

# By how much sums of estimated weights, and shares of them, may be wrong: for each unit of their
# total, and for each token. The logarithm of a weight has up to three roundings of 2^-24, of at
# most 23; its exponential is good to 3e-7; a block adds up to 128 roundings. A whole number of
# 2^-32 is up to half of that off.
ERROR_OF_TOTAL = 4e-5
ERROR_OF_TOKEN = 4e-10
TEMPERATURES = (1e-30, 1e30)  # for which that holds: beyond, fp32 overflows where it matters


class _Uncertain(Exception):
    """Estimates cannot tell what the draw is."""


class ScoreRow:
    """Chooses tokens by their scores.

    A draw is the one that the masses of all tokens give (sampler.py). Where very many tokens have
    a mass, the draw is first looked for with estimates in fp32, which take a third of the time:
    it is taken from them only if no error of theirs could change it.

    Args:
        scores: [vocab] fp32, not changed; no NaN, no +inf, and a finite value.
    """

    def __init__(self, scores: NDArray[np.float32]) -> None:
        self.scores = scores

    @property
    def largest_score(self) -> float:
        """NaN, if a score is no number."""
        return float(self.scores[self.scores.argmax()])

    def ranked(self, width: int) -> Ids:
        """The ids of the largest scores: the largest first, of ties the lowest id."""
        ids = self.largest(width)
        return ids[np.argsort(-self.scores[ids], kind="stable")]

    def largest(self, width: int) -> Ids:
        """The same ids, in ascending order."""
        scores = self.scores
        if width >= len(scores):
            return np.arange(len(scores))
        # As many blocks have a score of at least `enough`, so that no smaller one is needed.
        of_blocks = np.maximum.reduceat(scores, np.arange(0, len(scores), PER_BLOCK))
        enough = _at_rank(of_blocks, width) if width <= len(of_blocks) else -math.inf
        candidates = np.flatnonzero(scores >= enough)
        found = scores[candidates]
        return candidates[_largest(found, _at_rank(found, width), width)]

    def choose(self, params: SamplingParams, point: float) -> int:
        """Choose a token: the one with the largest score, of ties the lowest id, or by a draw.

        Args:
            params: with temperature 0, nothing is drawn.
            point: in (0, 1]; of the tokens in the order of their ids, the first that the
                distribution has this share up to is drawn.
        """
        if params.temperature == 0:
            return int(self.scores.argmax())
        # Differences and quotients may leave the range of their type, for which inf is right.
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            return _Draw(self, params, point).token()


class _Draw:
    """One draw from a row. See `ScoreRow.choose`."""

    def __init__(self, row: ScoreRow, params: SamplingParams, point: float) -> None:
        self.row = row
        self.scores = row.scores
        self.params = params
        self.point = point
        self.best = row.largest_score

    def token(self) -> int:
        """The token that is drawn."""
        params = self.params
        if 0 < params.top_k < len(self.scores):
            return self._exact(self.row.largest(params.top_k), params.top_p)
        is_possible = self.scores >= self._floor(self._reach())
        if not params.min_p and np.count_nonzero(is_possible) > MAX_EXACT:
            with suppress(_Uncertain):
                return self._estimated()
        return self._exact(np.flatnonzero(is_possible), params.top_p)

    def _reach(self) -> float:
        """No token whose logarithm is further below the largest one has a mass."""
        min_p = self.params.min_p
        return min(REACH, 0.01 - math.log(min_p)) if min_p else REACH

    def _floor(self, reach: float) -> float:
        """The score whose logarithm is so far below the largest one; not -inf."""
        return max(self.best - reach * self.params.temperature, -LARGEST)

    def _exact(self, ids: Ids, top_p: float) -> int:
        """The draw by masses.

        Args:
            ids: ascending; no other token has a mass.
            top_p: as in `SamplingParams`.
        """
        scores = self.scores[ids]
        masses = self._masses(scores)
        if top_p < 1:
            kept = self._nucleus(scores, self._masses, top_p * masses.sum())
            ids, masses = ids[kept], masses[kept]
        sums = masses.cumsum()
        return int(ids[sums.searchsorted(self.point * sums[-1])])

    def _masses(self, scores: Floats) -> Floats:
        masses = scores.astype(np.float64)
        # Subtract the largest score first: a tiny temperature then gives -inf, never +inf or NaN.
        masses -= self.best
        masses /= self.params.temperature
        torch.from_numpy(masses).exp_()  # with the same bits as in score_rows.py
        if self.params.min_p:
            masses[masses < self.params.min_p] = 0.0
        masses *= MOST_PROBABLE_MASS
        return np.rint(masses, out=masses)

    def _nucleus(self, scores: Floats, weigh: Weigh, target: float, error: float = 0.0) -> Ids:
        """The indices of the largest scores, as many as have a sum of weights together; ascending.

        Args:
            weigh: scores -> weights.
            error: of sums of weights.

        Raises:
            _Uncertain: an error might make them others.
        """
        for depth in DEPTHS:
            head = scores[np.flatnonzero(scores >= self._floor(depth))]
            head = np.sort(head)[::-1]
            sums = weigh(head).cumsum(dtype=np.float64)
            if sums[-1] >= target:
                break
        last = _certain_index(sums, target, error, before=-math.inf)
        return _largest(scores, head[last], last + 1)

    def _estimated(self) -> int:
        """The draw by estimated weights. Raises _Uncertain if they cannot tell it."""
        if not TEMPERATURES[0] <= self.params.temperature <= TEMPERATURES[1]:
            raise _Uncertain
        weights = self._weights(self.scores)
        starts = np.arange(0, len(weights), PER_BLOCK)
        sums = np.add.reduceat(weights, starts).cumsum(dtype=np.float64)
        total = float(sums[-1])
        error = ERROR_OF_TOTAL * total + ERROR_OF_TOKEN * len(weights)
        top_p = self.params.top_p
        if top_p < 1:
            kept = self._nucleus(self.scores, self._weights, top_p * total, error)
            return self._exact(kept, top_p=1.0)
        target = self.point * total
        block = int(sums.searchsorted(target))
        before = float(sums[block - 1]) if block else 0.0
        start = block * PER_BLOCK
        within = before + weights[start : start + PER_BLOCK].cumsum(dtype=np.float64)
        return start + _certain_index(within, target, error, before)

    def _weights(self, scores: Floats) -> Floats:
        weights = scores - np.float32(self.best)
        weights /= np.float32(self.params.temperature)
        return np.exp(weights, out=weights)


def _at_rank(scores: Floats, rank: int) -> float:
    """The score at a rank from 1 on."""
    return float(np.partition(scores, -rank)[-rank])


def _largest(scores: Floats, least: float, width: int) -> Ids:
    """The indices of the `width` largest scores, of ties the first, in ascending order.

    Args:
        least: the last of them.
    """
    indices = np.flatnonzero(scores >= least)
    surplus = len(indices) - width
    if surplus:
        ties = indices[scores[indices] == least]
        indices = np.setdiff1d(indices, ties[-surplus:], assume_unique=True)
    return indices


def _certain_index(sums: Floats, target: float, error: float, before: float) -> int:
    """The index of the first sum that reaches a target.

    Args:
        sums: ascending.
        error: of the sums.
        before: the sum before the first one.

    Raises:
        _Uncertain: an error might make it another.
    """
    index = int(sums.searchsorted(target))
    below = float(sums[index - 1]) if index else before
    if index == len(sums) or target - below < error or sums[index] - target < error:
        raise _Uncertain
    return index
