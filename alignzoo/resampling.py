"""Intervals over seeds and over held-out rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
_DRAWN = 2**22  # indices that are drawn at once


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; low and high are None where there is nothing to take an interval of."""

    mean: float
    low: float | None = None
    high: float | None = None

    def within(self, low: float, high: float) -> Estimate:
        """With an interval cut at bounds that the mean cannot pass."""
        if self.low is None or self.high is None:
            return self
        return Estimate(self.mean, max(low, self.low), min(high, self.high))

    @property
    def clear(self) -> bool:
        """Does the interval leave out 0?"""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean of one value a seed, with Student's t interval at 95 %; without an interval for a single seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean)
    half = t_quantile(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def t_quantile(p: float, df: int) -> float:
    """The quantile of Student's t distribution, 0.5 <= p < 1, whole degrees of freedom."""
    low, high = 0.0, 1.0
    while _t_cdf(high, df) < p:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, df: int) -> float:
    """The closed form for t >= 0 (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, df, 2):  # powers of the cosine up to df - 2
        total += term
        term *= cosine * cosine * k / (k + 1)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + inside / 2


def bootstrap(values: npt.ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The mean of one value a row, with the percentile interval at 95 % of its means over rows drawn with replacement.

    Given differences of two models on the same rows it is the paired bootstrap (Efron and Tibshirani 1993, chapter
    13). Calls with as many rows and the same seed draw the same rows.
    """
    rows = np.asarray(values, dtype=np.float64)
    if len(rows) < 2:
        return Estimate(float(rows.mean()))
    generator, means = np.random.default_rng(seed), np.empty(resamples)
    at_once = max(1, _DRAWN // len(rows))
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        means[start : start + count] = rows[generator.integers(len(rows), size=(count, len(rows)))].mean(-1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(rows.mean()), float(low), float(high))
