"""The policy's log-probs of an evaluation, each completion forwarded once, however often it is asked for.

A loss's `prepare`, the loss itself and the measure of held-out pairs want the same completions, in rows that need not
lie on the same rank, and rows that pairs were made into have their prompts in common. So all different completions of a
prompt are forwarded together, first of all, and looked up by their tokens afterwards. The reference's log-probs of a
run are computed in the same way, see precompute.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from alignzoo.batch import Layout, Way
from alignzoo.reference import lengths_of
from alignzoo.refstore import prompt_key, row_key
from alignzoo.tree import Completion, Tree


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


def joined(trees: Iterable[Tree], budget: int, way: Way, *, mismatched: bool) -> list[Tree]:
    """All different completions of each prompt as one tree, or as several where it would be above `budget` positions.

    Prompts in the order in which they come first; the trees' rows are their numbers in the result.
    """
    known: set[bytes] = set()
    found: list[Tree] = []
    latest: dict[bytes, int] = {}
    for tree in trees:
        for completion in tree.branches if mismatched else tree.completions:
            key = row_key(tree.prompt, completion.ids)
            if key in known:
                continue
            known.add(key)
            prompt = prompt_key(tree.prompt)
            n = latest.get(prompt)
            if n is not None:
                whole = replace(found[n], completions=(*found[n].completions, completion))
                if way.positions([whole]) <= budget:
                    found[n] = whole
                    continue
            latest[prompt] = len(found)
            found.append(Tree(len(found), tree.prompt, (completion,), tree.where))
    return found
