"""References for the losses of the zoo: plain floats and loops, from the papers' definitions. Read by test_losses.py.

Each takes a batch and the loss's settings and gives the values of the units, term after term.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from alignzoo_losses.alphapo import AlphaPO
from alignzoo_losses.apo import APO
from alignzoo_losses.bco import BCO
from alignzoo_losses.bco_unpaired import UnpairedBCO
from alignzoo_losses.cpo import CPO
from alignzoo_losses.discopop import DiscoPOP
from alignzoo_losses.exo import EXO
from alignzoo_losses.fdpo import FDPO
from alignzoo_losses.nca import NCA
from alignzoo_losses.robust import Robust
from alignzoo_losses.rpo import RPO
from alignzoo_losses.simpo import SimPO
from alignzoo_losses.slic import SLiC
from alignzoo_losses.sppo import SPPO
from loss_helpers import make_labelled, make_pairs, tokens

import alignzoo

Sides = Callable[[list[float], list[float], Any], float]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_probs(side: alignzoo.LogProbs) -> list[list[float]]:
    return tokens(side.policy, side.mask)


def log_ratios(side: alignzoo.LogProbs) -> list[float]:
    assert side.reference is not None
    against = tokens(side.reference, side.mask)
    return [sum(p) - sum(r) for p, r in zip(log_probs(side), against, strict=True)]


def on_ratios(formula: Callable[[float, float, Any], float]) -> Callable[[Any, Any], list[float]]:
    """A loss of the summed log-ratios of chosen and rejected."""

    def reference(batch: alignzoo.Pairs, s: Any) -> list[float]:
        return [formula(w, x, s) for w, x in zip(log_ratios(batch.chosen), log_ratios(batch.rejected), strict=True)]

    return reference


def on_tokens(formula: Sides) -> Callable[[Any, Any], list[float]]:
    """A loss of the log-probs of chosen and rejected tokens, without a reference."""

    def reference(batch: alignzoo.Pairs, s: Any) -> list[float]:
        return [formula(w, x, s) for w, x in zip(log_probs(batch.chosen), log_probs(batch.rejected), strict=True)]

    return reference


def simpo(w: list[float], x: list[float], s: Any) -> float:
    return -math.log(sigmoid(s.beta / len(w) * sum(w) - s.beta / len(x) * sum(x) - s.gamma))


def alphapo(w: list[float], x: list[float], s: Any) -> float:
    rewards = [s.beta * (1 - math.exp(sum(y) / len(y)) ** -s.alpha) / s.alpha for y in (w, x)]
    return -math.log(sigmoid(rewards[0] - rewards[1] - s.gamma))


def cpo(batch: alignzoo.Pairs, s: Any) -> list[float]:
    pairs = zip(log_probs(batch.chosen), log_probs(batch.rejected), strict=True)
    preference = [-math.log(sigmoid(s.beta * (sum(w) - sum(x)))) for w, x in pairs]
    return [*preference, *(-s.nll_weight * value for row in log_probs(batch.chosen) for value in row)]


def robust(w: float, x: float, s: Any) -> float:
    right, e = sigmoid(s.beta * (w - x)), s.label_smoothing
    return ((1 - e) * -math.log(right) - e * -math.log(1 - right)) / (1 - 2 * e)


def apo(w: float, x: float, s: Any) -> float:
    if s.variant == "zero":
        return (1 - sigmoid(s.beta * w)) + sigmoid(s.beta * x)
    return sigmoid(s.beta * w) + (1 - sigmoid(s.beta * (w - x)))


def sppo(w: float, x: float, s: Any) -> float:
    return (w - 1 / (2 * s.beta)) ** 2 + (x + 1 / (2 * s.beta)) ** 2


def nca(w: float, x: float, s: Any) -> float:
    p, q = sigmoid(s.beta * w), sigmoid(s.beta * x)
    return -math.log(p) - (math.log(1 - p) + math.log(1 - q)) / 2


def exo(w: float, x: float, s: Any) -> float:
    q, e = sigmoid(s.beta * (w - x)), s.label_smoothing
    return q * math.log(q / (1 - e)) + (1 - q) * math.log((1 - q) / e)


def rpo(batch: alignzoo.Pairs, s: Any) -> list[float]:
    margins = [w - x for w, x in zip(log_ratios(batch.chosen), log_ratios(batch.rejected), strict=True)]
    return [
        -math.log(sigmoid(s.beta * m)) - s.nll_weight * sum(row) / len(row)
        for m, row in zip(margins, log_probs(batch.chosen), strict=True)
    ]


def discopop(w: float, x: float, s: Any) -> float:
    h = s.beta * (w - x)
    m = sigmoid(h / s.tau)
    return (1 - m) * -math.log(sigmoid(h)) + m * math.exp(-h)


def slic(w: list[float], x: list[float], s: Any) -> float:
    return max(0.0, s.delta - sum(w) + sum(x)) - s.nll_weight * sum(w)


def fdpo(w: float, x: float, s: Any) -> float:
    def slope(log_u: float) -> float:
        u = math.exp(log_u)
        if s.divergence == "js":
            return math.log(2 * u / (1 + u))
        return 1 - 1 / u if s.divergence == "forward_kl" else (1 - u**-s.alpha) / s.alpha

    return -math.log(sigmoid(s.beta * (slope(w) - slope(x))))


def bco(w: float, x: float, s: Any) -> float:
    return -math.log(sigmoid(s.beta * w)) - math.log(1 - sigmoid(s.beta * x))


def bco_unpaired(batch: alignzoo.Labelled, s: Any) -> list[float]:
    chances = [sigmoid(s.beta * r) for r in log_ratios(batch.completion)]
    return [-math.log(p if good else 1 - p) for p, good in zip(chances, batch.label.tolist(), strict=True)]


ZOO: dict[str, tuple[alignzoo.Loss, Callable[..., Any], Callable[[Any, Any], list[float]]]] = {
    "simpo": (SimPO(beta=1.5, gamma=0.7), make_pairs, on_tokens(simpo)),
    "alphapo": (AlphaPO(beta=1.5, alpha=0.3, gamma=0.2), make_pairs, on_tokens(alphapo)),
    "alphapo below 0": (AlphaPO(alpha=-0.4), make_pairs, on_tokens(alphapo)),
    "cpo": (CPO(beta=0.3, nll_weight=0.6), make_pairs, cpo),
    "robust": (Robust(beta=0.3, label_smoothing=0.2), make_pairs, on_ratios(robust)),
    "apo zero": (APO(beta=0.3), make_pairs, on_ratios(apo)),
    "apo down": (APO(beta=0.3, variant="down"), make_pairs, on_ratios(apo)),
    "sppo": (SPPO(beta=0.03), make_pairs, on_ratios(sppo)),
    "nca": (NCA(beta=0.3), make_pairs, on_ratios(nca)),
    "exo": (EXO(beta=0.3, label_smoothing=0.05), make_pairs, on_ratios(exo)),
    "rpo": (RPO(beta=0.3, nll_weight=0.6), make_pairs, rpo),
    "discopop": (DiscoPOP(beta=0.1, tau=0.2), make_pairs, on_ratios(discopop)),
    "slic": (SLiC(delta=40.0, nll_weight=0.3), make_pairs, on_tokens(slic)),  # no margin is as large: all have a slope
    "fdpo js": (FDPO(beta=0.5), make_pairs, on_ratios(fdpo)),
    "fdpo forward": (FDPO(beta=0.5, divergence="forward_kl"), make_pairs, on_ratios(fdpo)),
    "fdpo alpha": (FDPO(beta=0.5, divergence="alpha", alpha=0.3), make_pairs, on_ratios(fdpo)),
    "bco": (BCO(beta=0.3, shift="none"), make_pairs, on_ratios(bco)),
    "bco unpaired": (UnpairedBCO(beta=0.3, shift="none"), make_labelled, bco_unpaired),
}
