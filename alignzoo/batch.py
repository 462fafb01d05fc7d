"""The plan of a run, pure and without torch: which rows make a step, which rows of it are forwarded together, and how.

Everything here is a function of lengths, ranks, budget and seed, so every rank knows the whole plan without asking.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from alignzoo.tree import Completion, Tree

Positions = Callable[[Sequence[Tree], bool], int]


@dataclass(frozen=True)
class StepRows:
    """One optimizer step: its number from 1, its epoch from 0, and the rows of the data set in order."""

    step: int
    epoch: int
    rows: tuple[int, ...]


def count_steps(n_rows: int, batch_size: int, epochs: int, max_steps: int | None) -> int:
    """Optimizer steps of a run; the last step of an epoch may be short."""
    steps = math.ceil(n_rows / batch_size) * epochs
    return steps if max_steps is None else min(steps, max_steps)


def steps_of(n_rows: int, batch_size: int, epochs: int, max_steps: int | None, seed: int) -> Iterator[StepRows]:
    """The steps in the order that the seed fixes. A step never spans two epochs."""
    total = count_steps(n_rows, batch_size, epochs, max_steps)
    step = 0
    for epoch in range(epochs):
        order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n_rows)
        for start in range(0, n_rows, batch_size):
            if step == total:
                return
            step += 1
            yield StepRows(step, epoch, tuple(int(r) for r in order[start : start + batch_size]))


def blocks_of(n_rows: int, size: int) -> list[tuple[int, ...]]:
    """Consecutive blocks of rows, for evaluation."""
    return [tuple(range(start, min(start + size, n_rows))) for start in range(0, n_rows, size)]


def padded_positions(trees: Sequence[Tree], mismatched: bool = False) -> int:
    """Positions that the padded layout forwards for these trees: sequences times the longest of them."""
    sequences = [n for tree in trees for n in _sequence_lengths(tree, mismatched)]
    return len(sequences) * max(sequences)


def _branches(tree: Tree, mismatched: bool) -> tuple[Completion, ...]:
    return tree.branches if mismatched else tree.completions


def _sequence_lengths(tree: Tree, mismatched: bool) -> list[int]:
    return [len(tree.prompt) + len(c.ids) for c in _branches(tree, mismatched)]


def plan_step(
    trees: Sequence[Tree],
    ranks: int,
    budget: int,
    *,
    mismatched: bool = False,
    positions: Positions = padded_positions,
) -> list[list[tuple[int, ...]]]:
    """For each rank its micro-batches, each a tuple of indices into `trees`.

    Trees of like length go together, no micro-batch forwards more than `budget` positions (a tree that is larger runs
    alone), and the ranks get the same number of micro-batches as far as the trees allow, balanced by positions.
    """
    order = sorted(range(len(trees)), key=lambda i: (-max(_sequence_lengths(trees[i], mismatched)), i))

    def cost(members: Sequence[int]) -> int:
        return positions([trees[i] for i in members], mismatched)

    micro: list[list[int]] = []
    for i in order:
        if micro and cost([*micro[-1], i]) <= budget:
            micro[-1].append(i)
        else:
            micro.append([i])
    _split_to_multiple(micro, ranks, cost)
    return _assign(micro, ranks, cost)


def _split_to_multiple(micro: list[list[int]], ranks: int, cost: Callable[[Sequence[int]], int]) -> None:
    """Halves the largest micro-batches until their number is a multiple of the ranks, or nothing can be halved."""
    while len(micro) % ranks:
        big = max((m for m in micro if len(m) > 1), key=cost, default=None)
        if big is None:
            return
        micro.remove(big)
        half = (len(big) + 1) // 2
        micro.extend([big[:half], big[half:]])


def _assign(micro: list[list[int]], ranks: int, cost: Callable[[Sequence[int]], int]) -> list[list[tuple[int, ...]]]:
    most = math.ceil(len(micro) / ranks) if micro else 0
    plan: list[list[tuple[int, ...]]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for members in sorted(micro, key=cost, reverse=True):
        rank = min((r for r in range(ranks) if len(plan[r]) < most), key=lambda r: (load[r], r))
        plan[rank].append(tuple(members))
        load[rank] += cost(members)
    return plan


@dataclass(frozen=True, eq=False)
class Layout:
    """Trees laid out for one forward pass: one padded sequence per completion, padding on the right.

    S sequences of L positions; N completions (N = S here) of at most T tokens; M completion tokens in all. Rows of N
    follow the trees, a tree's completions in order, its mismatched one last.
    """

    input_ids: npt.NDArray[np.int64]  # (S, L)
    attention_mask: npt.NDArray[np.int64]  # (S, L)
    source: npt.NDArray[np.int64]  # (M,) position in the flattened (S * L) that predicts the token
    target: npt.NDArray[np.int64]  # (M,) token ids
    place: npt.NDArray[np.int64]  # (M,) position in the flattened (N * T)
    mask: npt.NDArray[np.bool_]  # (N, T) the tokens that count
    keys: tuple[tuple[int, int], ...]  # (N,) (row of the data set, number of the completion in its tree)
    pieces: int = 1  # into how many pieces the head cuts M at least: the same on all ranks

    @property
    def positions(self) -> int:
        """Forwarded positions, padding included."""
        return self.input_ids.size

    @property
    def real_positions(self) -> int:
        return int(self.attention_mask.sum())


def padded_layout(trees: Sequence[Tree], *, mismatched: bool = False) -> Layout:
    """One row per completion: prompt, completion, padding. Padding is token 0 and is never read: masks tell."""
    entries = [(t, slot, c) for t in trees for slot, c in enumerate(_branches(t, mismatched))]
    length = max(len(t.prompt) + len(c.ids) for t, _, c in entries)
    longest = max(len(c.ids) for _, _, c in entries)
    ids = np.zeros((len(entries), length), np.int64)
    attention = np.zeros((len(entries), length), np.int64)
    mask = np.zeros((len(entries), longest), np.bool_)
    source, target, place = [], [], []
    for n, (tree, _, completion) in enumerate(entries):
        start, size = len(tree.prompt), len(completion.ids)
        if start == 0:
            raise ValueError(f"{tree.where}: a tree needs at least one prompt token to predict from")
        ids[n, :start], ids[n, start : start + size] = tree.prompt, completion.ids
        attention[n, : start + size] = 1
        mask[n, :size] = True if completion.mask is None else completion.mask
        source.append(n * length + np.arange(start - 1, start + size - 1))
        target.append(completion.ids.astype(np.int64))
        place.append(n * longest + np.arange(size))
    return Layout(
        ids, attention, np.concatenate(source), np.concatenate(target), np.concatenate(place), mask,
        tuple((t.row, slot) for t, slot, _ in entries),
    )  # fmt: skip
