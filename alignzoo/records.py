"""Lines of metrics.jsonl: what they are, and what is asked of them by tables and plots."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
PREFIXES = ("rewards", "log_ratios", "mean_logps")  # what stands for a reward, the best first
ACCURACIES = ("pairs", *PREFIXES)  # where an accuracy may be: held-out pairs before the loss's own data
KL = re.compile(r"(eval_)?kl(/|$)")
TIE = 1e-3  # a lead nearer to 0 than this counts as half right: with policy == reference it is rounding noise


@dataclass(frozen=True)
class Sample:
    """One prompt and the model's answers to it."""

    prompt: str
    before: str
    after: str


def is_eval(record: Record) -> bool:
    return any(key.startswith("eval_") for key in record)


def number(value: Any) -> float | None:
    """A finite number, else None."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927, JASA 22, 209-212); (0, 1) for n = 0.

    `successes` may be fractional: a tie counts one half. z = 1.96 gives 95 %.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    if n == 0:
        return 0.0, 1.0
    p, shrink = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def interval(share: float, rows: int) -> tuple[float, float]:
    return wilson(min(max(share, 0.0), 1.0) * rows, rows)  # a mean in floating point may pass 1 by a rounding
