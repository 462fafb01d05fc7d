"""Sampled and rewarded completions into the kind of data that a loss eats. It imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from alignzoo.recipe import Rollout
from alignzoo.tree import Completion, Ids, LogPs, Tree


@dataclass(frozen=True, eq=False)
class Sampled:
    """One completion of a prompt, as the sampler left it. Those of the policy come first."""

    ids: Ids  # (n,), its end token among them where it stopped by itself
    logps: LogPs | None  # (n,) as the sampler computed them; None of another author's
    truncated: bool  # it had not ended at max_new_tokens
    text: str = ""
    reward: float | None = None  # None where no reward applies
    rewards: Mapping[str, float | None] = field(default_factory=dict)  # each of them, before its weight
    author: str = ""  # the policy, or who else of rollout.others
    beats: int | None = None  # the number of the policy's completion that it is better than, whatever the rewards

    @property
    def completion(self) -> Completion:
        return Completion(self.ids, sampler=self.logps)


def make_trees(kind: str, prompt: Tree, sampled: Sequence[Sampled], settings: Rollout) -> list[Tree]:
    """What a loss on this kind of data learns from the completions of one prompt; none where there is nothing.

    prompt: without completions. Rows of several trees of one prompt are told apart by `row`, see `numbered`.
    """
    return _MAKERS[kind](prompt, sampled, settings)


def _groups(prompt: Tree, sampled: Sequence[Sampled], settings: Rollout) -> list[Tree]:
    """All of them; NaN as the reward of one that has none."""
    del settings
    rewards = tuple(math.nan if one.reward is None else one.reward for one in sampled)
    tree = replace(prompt, completions=tuple(one.completion for one in sampled), rewards=rewards)
    return [replace(tree, truncated=tuple(one.truncated for one in sampled))]


def ranked(sampled: Sequence[Sampled]) -> list[Sampled]:
    """Those with a reward, the best first; of equal ones the one that was sampled first."""
    return sorted((one for one in sampled if one.reward is not None), key=lambda one: -(one.reward or 0.0))


def best_and_worst(sampled: Sequence[Sampled], settings: Rollout) -> Iterator[tuple[Sampled, Sampled]]:
    """The best against the worst, the second best against the second worst, and so on."""
    order = ranked(sampled)
    most = min(settings.pairs_per_prompt, len(order) // 2)
    for best, worst in zip(order[:most], order[::-1][:most], strict=True):
        gap = (best.reward or 0.0) - (worst.reward or 0.0)
        if gap > settings.min_gap and not np.array_equal(best.ids, worst.ids):
            yield best, worst


def better_and_worse(sampled: Sequence[Sampled], settings: Rollout) -> list[tuple[Sampled, Sampled]]:
    """Pairs by reward; or another author's completions, each with the one of the policy that it is better than."""
    if not settings.directed:
        return list(best_and_worst(sampled, settings))
    known = [(one, sampled[one.beats]) for one in sampled if one.beats is not None]
    return [(one, other) for one, other in known if not np.array_equal(one.ids, other.ids)]


def _pairs(prompt: Tree, sampled: Sequence[Sampled], settings: Rollout) -> list[Tree]:
    found = better_and_worse(sampled, settings)
    return [replace(prompt, completions=(best.completion, worst.completion)) for best, worst in found]


def _labelled(prompt: Tree, sampled: Sequence[Sampled], settings: Rollout) -> list[Tree]:
    """Each by itself, desirable from the threshold on; or of better and worse ones, the better."""
    line = settings.threshold or 0.0
    if settings.directed:
        found = [(one, one is pair[0]) for pair in better_and_worse(sampled, settings) for one in pair]
    else:
        found = [(one, one.reward >= line) for one in sampled if one.reward is not None]
    return [replace(prompt, completions=(one.completion,), label=label) for one, label in found]


def to_imitate(sampled: Sequence[Sampled], settings: Rollout) -> list[Sampled]:
    """The best by reward, where it reaches the threshold; or all of the authors who are always better."""
    if settings.directed:
        return [one for one in sampled if one.beats is not None]
    best = ranked(sampled)[:1]
    return [one for one in best if settings.threshold is None or (one.reward or 0.0) >= settings.threshold]


def _demonstrations(prompt: Tree, sampled: Sequence[Sampled], settings: Rollout) -> list[Tree]:
    return [replace(prompt, completions=(one.completion,)) for one in to_imitate(sampled, settings)]


_Maker = Callable[[Tree, Sequence[Sampled], Rollout], list[Tree]]
_MAKERS: dict[str, _Maker] = {
    "groups": _groups, "pairs": _pairs, "labelled": _labelled, "demonstrations": _demonstrations,
}  # fmt: skip


def numbered(trees: Sequence[Tree], rows: int) -> list[Tree]:
    """Trees with a row of their own each, where several of one prompt have the same. rows: of the data set."""
    seen: dict[int, int] = {}
    found = []
    for tree in trees:
        times = seen[tree.row] = seen.get(tree.row, -1) + 1
        found.append(replace(tree, row=tree.row + times * rows) if times else tree)
    return found


def mismatch(trees: Sequence[Tree], max_length: int) -> list[Tree]:
    """Each tree with the completion of the next tree that has another prompt; [] where all have the same.

    It is cut where it would not fit into max_length after this prompt.
    """
    found = []
    for i, tree in enumerate(trees):
        others = (trees[(i + k) % len(trees)] for k in range(1, len(trees)))
        other = next((t for t in others if not np.array_equal(t.prompt, tree.prompt)), None)
        if other is None:
            return []
        room = max_length - len(tree.prompt)
        found.append(replace(tree, mismatched=Completion(other.completions[0].ids[:room])))
    return found
