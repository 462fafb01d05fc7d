"""Rows of an optimizer step with made-up log-probs, from a few numbers that can be printed.

A value depends on seed, row and completion only, so a smaller case of the same seed holds the same rows. Values are
multiples of 2^-30: sums of them are exact in float64, whatever their order, so a loss with a threshold does not flip
with the padding. They are never equal by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignzoo.api import Loss
from alignzoo.tree import Completion, Tree

QUANTUM = 2.0**-30


@dataclass(frozen=True)
class Case:
    """What a check is tried on: settings other than the defaults, and which rows are drawn."""

    settings: tuple[tuple[str, Any], ...] = ()
    draw: str = "plain"  # a key of DRAWS
    rows: int = 3
    tokens: int = 4  # of the longest completion
    seed: int = 0

    def words(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings) or "the defaults"
        size = f"{self.rows} row{'s' * (self.rows > 1)} of up to {self.tokens} token{'s' * (self.tokens > 1)}"
        return f'{size}, draw="{self.draw}", seed={self.seed}, settings: {settings}'


@dataclass(frozen=True, eq=False)
class Rows:
    """Trees with the log-probs of their tokens. M tokens of all completions, mismatched ones too."""

    trees: tuple[Tree, ...]
    starts: Mapping[tuple[int, int], int]  # where the tokens of (row, number of the completion) begin in M
    policy: Tensor  # (M,) float64, nats
    reference: Tensor  # (M,)
    stats: Mapping[str, Tensor]  # (M,) entropy, log_sum_sq_probs, is_top1
    old: Tensor | None = None  # (M,) groups
    sampler: Tensor | None = None  # (M,) groups

    @cached_property
    def counted(self) -> Tensor:
        """(M,) bool, the tokens that count."""
        return self.table(lambda *_: 1.0).bool()

    def table(self, value: Callable[[Tree, int, Completion], float]) -> Tensor:
        """(M,) float64: a value for each completion at its tokens that count, 0 elsewhere."""
        found = torch.zeros(len(self.policy), dtype=torch.float64)
        for tree in self.trees:
            for slot, completion in enumerate(tree.branches):
                start = self.starts[tree.row, slot]
                mask = np.ones(len(completion.ids), bool) if completion.mask is None else completion.mask
                found[start : start + len(mask)] = torch.from_numpy(mask) * value(tree, slot, completion)
        return found

    def ordered(self, order: Sequence[int]) -> Rows:
        """The same rows in another order; M stays as it is."""
        return replace(self, trees=tuple(self.trees[i] for i in order))

    def words(self) -> list[str]:
        """The values, a line for each completion, where there are few."""
        if len(self.policy) > 16:
            return []
        lines = []
        for tree in self.trees:
            facts = {"label": tree.label, "rewards": tree.rewards, "truncated": tree.truncated, **tree.extra}
            told = "".join(f", {name} {value}" for name, value in facts.items() if value is not None)
            for slot, completion in enumerate(tree.branches):
                at = slice(self.starts[tree.row, slot], self.starts[tree.row, slot] + len(completion.ids))
                mask = "" if completion.mask is None else f", mask {completion.mask.astype(int).tolist()}"
                values = f"policy {_short(self.policy[at])}, reference {_short(self.reference[at])}"
                lines.append(f"row {tree.row}{told}, completion {slot}: {values}{mask}")
        return lines


def _short(values: Tensor) -> str:
    return "[" + ", ".join(f"{v:.4g}" for v in values.tolist()) + "]"


@dataclass(frozen=True)
class _Place:
    """Where a draw is asked for log-probs."""

    kind: str
    row: int
    slot: int
    good: bool  # a chosen, desirable or demonstrated completion
    n: int  # tokens
    random: Random


Pair = tuple[list[float], list[float]]  # log-probs of policy and reference, (n,) each


def _down(random: Random, low: float, high: float) -> float:
    """A number between low and high, a multiple of QUANTUM."""
    return math.floor(random.uniform(low, high) / QUANTUM) * QUANTUM


def _plain(at: _Place) -> Pair:
    return [_down(at.random, -3, -0.05) for _ in range(at.n)], [_down(at.random, -3, -0.05) for _ in range(at.n)]


def _near(at: _Place) -> Pair:
    policy, _ = _plain(at)
    return policy, [min(0.0, p + _down(at.random, -0.1, 0.1)) for p in policy]


def _equal(at: _Place) -> Pair:
    policy, _ = _plain(at)
    return policy, policy


def _constant(value: float) -> Callable[[_Place], Pair]:
    return lambda at: ([value] * at.n, [value] * at.n)


def _far(at: _Place) -> Pair:
    """Policy and reference either all but certain or 25 nats a token down, in all combinations over 16 rows."""
    low = [bool(at.row >> bit & 1) for bit in (at.slot % 2, 2 + at.slot % 2)]
    return [-25.0 if low[0] else 0.0] * at.n, [-25.0 if low[1] else 0.0] * at.n


def _apart(nats: float) -> Callable[[_Place], Pair]:
    """Good completions this far ahead of the others, in nats of the log-ratio between the two."""

    def draw(at: _Place) -> Pair:
        reference = [_down(at.random, -2, -1) - abs(nats) for _ in range(at.n)]
        gain = math.floor((nats if at.good else -nats) / 2 / at.n / QUANTUM) * QUANTUM
        return [r + gain for r in reference], reference

    return draw


DRAWS: dict[str, Callable[[_Place], Pair]] = {
    "plain": _plain,
    "near": _near,
    "equal": _equal,
    "zero": _constant(0.0),
    "certain": _constant(-1e-8),
    "far": _far,
    **{f"{word} by {nats}": _apart(sign * nats)
       for word, sign in (("ahead", 1.0), ("behind", -1.0)) for nats in (1, 10, 100)},
    "good rows only": _plain,
    "bad rows only": _plain,
    "nothing counts": _plain,
    "equal rewards": _near,
    "first step": _near,
}  # fmt: skip
ABOUT = {
    "plain": "policy and reference drawn from -3 to 0 nats a token",
    "near": "the reference within 0.1 nats a token of the policy",
    "equal": "policy == reference",
    "zero": "all log-probs 0",
    "certain": "all log-probs -1e-8",
    "far": "sums of 0 and, with 400 tokens, of -1e4, in all combinations",
    "ahead by N, behind by N": "the log-ratios of chosen and rejected (good and bad rows) N nats apart",
    "good rows only, bad rows only": "labelled rows of one label",
    "nothing counts": "groups: all truncated, no reward (NaN); labelled: one label",
    "equal rewards": "groups: all rewards of a prompt are the same",
    "first step": "groups: neither old nor sampler",
}


def draw(loss: Loss, case: Case, columns: Sequence[str] = ()) -> Rows:
    """The rows of a case for a loss: of its kind of data, with mismatched completions where it asks for them."""
    return _drawn(loss.data, loss.needs_mismatched, replace(case, settings=()), tuple(columns))


@lru_cache(1000)
def _drawn(kind: str, mismatched: bool, case: Case, columns: tuple[str, ...]) -> Rows:
    trees, pairs, starts, at = [], [], {}, 0
    for row in range(case.rows):
        tree = _tree(kind, case, row, columns, mismatched)
        for slot, completion in enumerate(tree.branches):
            good = bool(tree.label) if kind == "labelled" else slot == 0
            where = _Place(kind, row + case.seed, slot, good, len(completion.ids), _random(case, row, slot, "values"))
            pairs.append(DRAWS[case.draw](where))
            starts[row, slot] = at
            at += len(completion.ids)
        trees.append(tree)
    policy, reference = (
        torch.tensor([v for pair in pairs for v in pair[side]], dtype=torch.float64) for side in (0, 1)
    )
    return Rows(tuple(trees), starts, policy, reference, **_beside(kind, case, policy))


def _beside(kind: str, case: Case, policy: Tensor) -> dict[str, Any]:
    """Token statistics, and of groups the log-probs of the rollout; those of the policy where it is the reference."""
    random, m = _random(case, 0, 0, "stats"), len(policy)

    def noisy(size: float) -> Tensor:
        if case.draw in ("equal", "zero", "certain"):
            return policy.clone()
        return (policy + torch.tensor([_down(random, -size, size) for _ in range(m)])).clamp(max=0)

    found: dict[str, Any] = {
        "stats": {
            "entropy": torch.tensor([_down(random, 0.1, 3) for _ in range(m)], dtype=torch.float64),
            "log_sum_sq_probs": torch.tensor([_down(random, -3, -0.1) for _ in range(m)], dtype=torch.float64),
            "is_top1": torch.tensor([random.random() < 0.5 for _ in range(m)]),
        }
    }
    if kind == "groups" and case.draw != "first step":
        found |= {"old": noisy(0.5), "sampler": noisy(0.5)}
    return found


def _random(case: Case, row: int, slot: int, what: str) -> Random:
    return Random(f"{case.seed} {row} {slot} {what}")


def _tree(kind: str, case: Case, row: int, columns: Sequence[str], mismatched: bool) -> Tree:
    random = _random(case, row, -1, "tree")
    size = {"pairs": 2, "groups": random.choice((2, 3, 4)) if row or case.seed else 3}.get(kind, 1)
    facts: dict[str, Any] = {}
    if kind == "labelled":
        one_sided = {"good rows only": True, "bad rows only": False, "nothing counts": False}
        facts["label"] = one_sided.get(case.draw, (row + case.seed) % 2 == 0)
    if kind == "groups":
        nothing, equal = case.draw == "nothing counts", case.draw == "equal rewards"
        rewards = [0.5 if equal else math.nan if nothing else _down(random, -1, 1) for _ in range(size)]
        facts["rewards"] = tuple(float(np.float32(reward)) for reward in rewards)
        facts["truncated"] = tuple(nothing or (case.draw == "plain" and random.random() < 0.2) for _ in range(size))
    return Tree(
        row=row,
        prompt=np.arange(1, 2 + random.randrange(4), dtype=np.int32),
        completions=tuple(_completion(case, row, slot) for slot in range(size)),
        where=f"row {row}",
        extra={name: float(np.float32(_random(case, row, 0, name).uniform(0.1, 2))) for name in columns},
        mismatched=_completion(case, row, size) if mismatched else None,
        **facts,
    )


def _completion(case: Case, row: int, slot: int) -> Completion:
    """Of 1 to `tokens` tokens, the first of all the longest; some of three or more have tokens that do not count."""
    random = _random(case, row, slot, "length")
    n = case.tokens if (row, slot) == (0, 0) or case.draw == "far" else random.randint(1, case.tokens)
    mask = None
    if n >= 3 and random.random() < 0.4 and case.draw != "far":
        mask = np.ones(n, bool)
        mask[random.sample(range(n), n // 3)] = False
    return Completion(np.arange(2, 2 + n, dtype=np.int32), mask)


@dataclass(frozen=True)
class Asked(Mapping[str, Tensor]):
    """Stands in for `extra`, gives a column for any name and notes which ones were asked for."""

    rows: int
    names: dict[str, None] = field(default_factory=dict)
    optional: set[str] = field(default_factory=set)  # asked for with `in` or get() before they were read

    def __getitem__(self, name: str) -> Tensor:
        self.names[name] = None
        return torch.ones(self.rows)

    def __contains__(self, name: object) -> bool:
        self.optional.update({str(name)} - self.names.keys())
        return True

    def get(self, name: str, _default: Any = None, /) -> Tensor:
        self.optional.update({name} - self.names.keys())
        return self[name]

    def __iter__(self) -> Any:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
