"""From verdicts in both orders to the rate at which one side wins. It imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignzoo.judging import OVERALL, TIE, A, B, Judge
from alignzoo.lengthcontrol import length_controlled
from alignzoo.resampling import Estimate, bootstrap

SCORES = {A: 1.0, TIE: 0.5, B: 0.0}


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt and what was said of them."""

    row: int
    prompt: Any
    answers: Mapping[str, str]
    truncated: Mapping[str, bool]
    verdicts: Mapping[str, Mapping[str, str | None]]  # by order, then by dimension

    def by_order(self, dimension: str, orders: Sequence[str]) -> list[str] | None:
        """The verdicts in these orders; None where one of them is not there."""
        found = [self.verdicts.get(order, {}).get(dimension) for order in orders]
        return [one for one in found if one is not None] if None not in found else None

    def verdict(self, dimension: str, orders: Sequence[str]) -> str | None:
        """A, B, or a tie, which disagreeing orders make too; None without verdicts in all orders."""
        found = self.by_order(dimension, orders)
        return None if found is None else found[0] if len(set(found)) == 1 else TIE


@dataclass(frozen=True)
class Dimension:
    """How A did against B by one dimension, over the pairs with a verdict."""

    name: str
    pairs: int
    wins: int
    ties: int
    losses: int
    missing: int  # pairs without a verdict in all orders
    rate: Estimate | None  # wins and half of the ties, of the pairs; None where there are none
    controlled: Estimate | None  # the same for answers of equal length
    flips: int | None  # pairs whose two orders name different winners; None where there are no orders
    to_first: int | None  # those of them in which the first answer wins in both orders

    @property
    def bias(self) -> float | None:
        """Position bias: the share of pairs in which the order decides."""
        return None if self.flips is None or not self.pairs else self.flips / self.pairs


@dataclass(frozen=True)
class Results:
    """All that is known at the end."""

    judge: str
    names: Mapping[str, str]
    orders: Sequence[str]
    dimensions: Sequence[Dimension]  # the overall verdict first
    pairs: Sequence[Pair]
    characters: Mapping[str, float]  # mean length of the answers
    notes: Sequence[str]

    @property
    def overall(self) -> Dimension:
        return self.dimensions[0]

    @property
    def verdict(self) -> str:
        """In a sentence."""
        one, rate = self.overall, self.overall.rate
        if rate is None:
            return "no pair has a verdict"
        interval = (
            "" if rate.low is None or rate.high is None else f" (95 % interval {rate.low:.3f} to {rate.high:.3f})"
        )
        above = rate.low is not None and rate.low > 0.5
        below = rate.high is not None and rate.high < 0.5
        words = "A is better" if above else "B is better" if below else "no difference is shown"
        return f"A = {self.names[A]} wins {rate.mean:.3f}{interval} of {one.pairs} against B = {self.names[B]}: {words}"


def results(judge: Judge, names: Mapping[str, str], pairs: Sequence[Pair], failed: str) -> Results:
    """failed: the first request that came to nothing, in words"""
    order = [OVERALL, *(name for name in judge.dimensions if name != OVERALL)]
    found = [_dimension(name, pairs, judge.orders) for name in order]
    characters = {side: float(np.mean([len(pair.answers[side]) for pair in pairs])) for side in (A, B)}
    return Results(judge.describe(), names, judge.orders, found, pairs, characters, _notes(found, pairs, failed))


def _dimension(name: str, pairs: Sequence[Pair], orders: Sequence[str]) -> Dimension:
    judged = [(pair, verdict) for pair in pairs if (verdict := pair.verdict(name, orders)) is not None]
    verdicts = [verdict for _, verdict in judged]
    won = [SCORES[verdict] for verdict in verdicts]
    longer = [len(pair.answers[A]) - len(pair.answers[B]) for pair, _ in judged]
    both = [pair.by_order(name, orders) for pair, _ in judged]
    ordered = len(orders) == 2
    return Dimension(
        name, len(judged), verdicts.count(A), verdicts.count(TIE), verdicts.count(B), len(pairs) - len(judged),
        bootstrap(won) if won else None, length_controlled(won, longer) if won else None,
        sum({A, B} == set(one or ()) for one in both) if ordered else None,
        sum(one == [order[0] for order in orders] for one in both) if ordered else None,
    )  # fmt: skip


def _notes(found: Sequence[Dimension], pairs: Sequence[Pair], failed: str) -> list[str]:
    """What is to be known beside the numbers, with counts."""
    notes = []
    for one in found:
        if one.missing:
            notes.append(f"{one.name}: {one.missing} of {len(pairs)} pairs have no verdict and are left out")
    if failed:
        notes.append(f"some requests failed, and this command again asks them again; the first: {failed}")
    for side in (A, B):
        cut = sum(pair.truncated[side] for pair in pairs)
        if cut:
            notes.append(f"{cut} of {len(pairs)} answers of {side.upper()} were cut at --max-new-tokens")
    same = sum(pair.answers[A] == pair.answers[B] for pair in pairs)
    if same:
        notes.append(f"{same} of {len(pairs)} pairs are of two answers that are the same")
    return notes
