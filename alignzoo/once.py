"""The policy's log-probs of an evaluation, each completion forwarded once, however often it is asked for.

A loss's `prepare`, the loss itself and the measure of held-out pairs want the same completions, in rows that need not
lie on the same rank, and rows that pairs were made into have their prompts in common. So all different completions of a
prompt are forwarded together, first of all, and looked up by their tokens afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from alignzoo.batch import Layout
from alignzoo.reference import lengths_of
from alignzoo.refstore import row_key
from alignzoo.tree import Completion, Ids, Tree


@dataclass
class Once:
    """What a Scorer makes of completions: of each (t,) log-probs and token statistics, on the CPU."""

    kept: dict[bytes, dict[str, Tensor]] = field(default_factory=dict)

    def add(self, trees: Sequence[Tree], layout: Layout, scores: Mapping[str, Tensor]) -> None:
        """Keeps a micro-batch. scores: (N, T) each."""
        tables, lengths = {name: table.cpu() for name, table in scores.items() if table.dim() == 2}, lengths_of(layout)
        for n, (tree, completion) in enumerate(_entries(trees, layout)):
            row = {name: table[n, : lengths[n]].clone() for name, table in tables.items()}
            self.kept[row_key(tree.prompt, completion.ids)] = row

    def scores(self, trees: Sequence[Tree], layout: Layout, device: torch.device) -> dict[str, Tensor]:
        """The same for other trees and their layout, (N, T); 0 behind the end of a completion, as a Scorer has it."""
        rows = [self.kept[row_key(tree.prompt, completion.ids)] for tree, completion in _entries(trees, layout)]
        return {name: pad_sequence([row[name] for row in rows], batch_first=True).to(device) for name in rows[0]}

    @classmethod
    def merged(cls, ranks: Iterable[Once]) -> Once:
        return cls({key: row for one in ranks for key, row in one.kept.items()})


def _entries(trees: Sequence[Tree], layout: Layout) -> list[tuple[Tree, Completion]]:
    """The completions of a layout, with their trees; those of other prompts only where it has them."""
    whole = [(tree, completion) for tree in trees for completion in tree.branches]
    if len(whole) == len(layout.keys):
        return whole
    return [(tree, completion) for tree in trees for completion in tree.completions]


@dataclass
class _Joined:
    """A tree to which completions are still added."""

    prompt: Ids
    where: str
    completions: list[Completion] = field(default_factory=list)
    longest: int = 0


def joined(trees: Iterable[Tree], budget: int, *, mismatched: bool) -> list[Tree]:
    """All different completions of each prompt as one tree, or as several where it would be above `budget` positions
    with padding. Prompts in the order in which they come first.
    """
    known: set[bytes] = set()
    found: list[_Joined] = []
    latest: dict[bytes, _Joined] = {}
    for tree in trees:
        for completion in tree.branches if mismatched else tree.completions:
            key = row_key(tree.prompt, completion.ids)
            if key in known:
                continue
            known.add(key)
            prompt, size = tree.prompt.tobytes(), len(tree.prompt) + len(completion.ids)
            one = latest.get(prompt)
            if one is None or (len(one.completions) + 1) * max(one.longest, size) > budget:
                one = latest[prompt] = _Joined(tree.prompt, tree.where)
                found.append(one)
            one.completions.append(completion)
            one.longest = max(one.longest, size)
    return [Tree(n, one.prompt, tuple(one.completions), where=one.where) for n, one in enumerate(found)]
