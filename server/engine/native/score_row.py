"""The scores of one row on a CPU: its largest ones, and draws from it.

In numpy and on one thread. torch's operations on a vocabulary wake a team of threads and wait for
it, which takes longer than most of them, and longest where another thread needs the core.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from server.engine.request import SamplingParams

    Floats = NDArray[np.floating]
    Ids = NDArray[np.intp]

LARGEST = float(np.finfo(np.float32).max)
MOST_PROBABLE_MASS = 2.0**32

REACH = 23.0  # a mass rounds to zero below this logarithm: 2^32 · exp(-23) < 1/2
DEPTHS = (7.0, 10.0, math.inf)  # logarithms in which a nucleus is looked for, one after the other
PER_BLOCK = 128  # scores that are looked at together


class ScoreRow:
    """Chooses tokens by their scores.

    A draw is the one that the masses of all tokens give (sampler.py). Only those are computed that
    can be drawn.

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
            return self._drawn(self.row.largest(params.top_k), params.top_p)
        possible = np.flatnonzero(self.scores >= self._floor(self._reach()))
        return self._drawn(possible, params.top_p)

    def _reach(self) -> float:
        """No token whose logarithm is further below the largest one has a mass."""
        min_p = self.params.min_p
        return min(REACH, 0.01 - math.log(min_p)) if min_p else REACH

    def _floor(self, reach: float) -> float:
        """The score whose logarithm is so far below the largest one; not -inf."""
        return max(self.best - reach * self.params.temperature, -LARGEST)

    def _drawn(self, ids: Ids, top_p: float) -> int:
        """The draw from some tokens.

        Args:
            ids: ascending; no other token has a mass.
            top_p: as in `SamplingParams`.
        """
        scores = self.scores[ids]
        masses = self._masses(scores)
        if top_p < 1:
            kept = self._nucleus(scores, top_p * masses.sum())
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

    def _nucleus(self, scores: Floats, target: float) -> Ids:
        """The indices of the largest scores, as many as have this mass together; ascending."""
        for depth in DEPTHS:
            head = scores[np.flatnonzero(scores >= self._floor(depth))]
            head = np.sort(head)[::-1]
            sums = self._masses(head).cumsum()
            if sums[-1] >= target:
                break
        last = int(sums.searchsorted(target))
        return _largest(scores, head[last], last + 1)


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
