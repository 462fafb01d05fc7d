"""Win rates of judged pairs: with ties and intervals, and as they would be if both answers were as long. numpy only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from alignzoo.resampling import Estimate

RESAMPLES = 2000
_RIDGE = np.array([1e-3, 0.1])  # of theta and phi: keeps them finite where one answer or length alone decides
_STEPS = 100
_LONGEST = 1.0  # step of Newton's iteration: keeps it from overshooting where the data are separable
_DRAWN = 2**21  # numbers that are held at once

Values = npt.NDArray[np.float64]


def length_controlled(won: npt.ArrayLike, difference: npt.ArrayLike, resamples: int = RESAMPLES, seed: int = 0,
                      ) -> Estimate:  # fmt: skip
    """The win rate that a logistic model gives for answers of equal length, with its bootstrap interval at 95 %.

        P(A wins) = sigmoid(theta + phi tanh((length of A - length of B) / sd)),   the rate: sigmoid(theta)

    won: (N,) 1, 1/2 for a tie, 0. difference: (N,) of the lengths; sd is theirs over the N prompts.
    Dubois et al. 2024, Length-Controlled AlpacaEval (arXiv:2404.04475). Ours is simpler: it has no term for the
    difficulty of a prompt, which they fit over many models, and theta and phi are fitted to this one pair of models,
    with a fixed ridge penalty of 0.0005 theta^2 + 0.05 phi^2. Each resample refits both. Where length alone decides,
    the data do not tell theta, and the rate comes near to 1/2 without reaching it.
    """
    y, d = np.asarray(won, np.float64), np.asarray(difference, np.float64)
    spread = d.std()
    x = np.tanh(d / spread) if spread > 0 else np.zeros_like(d)
    rate = float(_sigmoid(_fit(x, y, np.ones((1, len(y))))[0, 0]))
    if len(y) < 2:
        return Estimate(rate)
    generator, rates = np.random.default_rng(seed), np.empty(resamples)
    at_once = max(1, _DRAWN // len(y))
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        weights = generator.multinomial(len(y), np.full(len(y), 1 / len(y)), size=count).astype(np.float64)
        rates[start : start + count] = _sigmoid(_fit(x, y, weights)[:, 0])
    low, high = np.quantile(rates, (0.025, 0.975))
    return Estimate(rate, float(low), float(high))


def _fit(x: Values, y: Values, weights: Values) -> Values:
    """(R, 2) theta and phi, by Newton's iteration, for x, y (N,) and weights (R, N)."""
    design = np.stack([np.ones_like(x), x], -1)  # (N, 2)
    products = (design[:, :, None] * design[:, None, :]).reshape(len(x), 4)  # (N, 4)
    found = np.zeros((len(weights), 2))
    for _ in range(_STEPS):
        p = _sigmoid(found @ design.T)  # (R, N)
        gradient = (weights * (y - p)) @ design - _RIDGE * found  # (R, 2)
        information = ((weights * p * (1 - p)) @ products).reshape(-1, 2, 2) + np.diag(_RIDGE)
        step = np.linalg.solve(information, gradient[:, :, None])[:, :, 0]
        step *= np.minimum(1.0, _LONGEST / np.maximum(np.abs(step).max(-1, keepdims=True), 1e-12))
        found += step
        if np.abs(step).max() < 1e-9:
            break
    return found


def _sigmoid(z: Values) -> Values:
    return np.asarray(0.5 * (1 + np.tanh(z / 2)))
