"""The plan of a run, pure and without torch: which rows make a step, which rows of it are forwarded together, and how.

Everything here is a function of lengths, ranks, budget and seed, so every rank knows the whole plan without asking.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from alignzoo.tree import Completion, Tree


@dataclass(frozen=True)
class StepRows:
    """One optimizer step: its number from 1, its epoch from 0, and the rows of the data set in order.

    batch: the number of these rows among all batches, from 1; the step's, but where batches are gone through again
    """

    step: int
    epoch: int
    rows: tuple[int, ...]
    batch: int


def count_steps(n_rows: int, batch_size: int, epochs: int, max_steps: int | None, iterations: int = 1) -> int:
    """Optimizer steps of a run; the last batch of an epoch may be short. iterations: steps of each batch."""
    steps = math.ceil(n_rows / batch_size) * epochs * iterations
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
            yield StepRows(step, epoch, tuple(int(r) for r in order[start : start + batch_size]), step)


def windows_of(steps: Iterator[StepRows], size: int, iterations: int, total: int) -> Iterator[tuple[StepRows, ...]]:
    """The batches, `size` at a time, each window gone through `iterations` times: `total` steps, window by window."""
    done = 0
    while done < total:
        batches = [*itertools.islice(steps, min(size, total - done))]
        window = [replace(b, step=done + n) for n, b in enumerate(batches * iterations, start=1)][: total - done]
        done += len(window)
        yield tuple(window)


def blocks_of(rows: Sequence[Tree], size: int) -> list[Sequence[Tree]]:
    """Consecutive blocks of rows, for evaluation."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def padded_positions(trees: Sequence[Tree], mismatched: bool = False) -> int:
    """Positions that the padded layout forwards for these trees: sequences times the longest of them."""
    sequences = [n for tree in trees for n in _sequence_lengths(tree, mismatched)]
    return len(sequences) * max(sequences)


def _branches(tree: Tree, mismatched: bool) -> tuple[Completion, ...]:
    return tree.branches if mismatched else tree.completions


def _sequence_lengths(tree: Tree, mismatched: bool) -> list[int]:
    return [len(tree.prompt) + len(c.ids) for c in _branches(tree, mismatched)]


def packed_positions(trees: Sequence[Tree], mismatched: bool = False, *, shared: bool = True) -> int:
    """Positions of a row without padding. shared: each prompt once; else once for each of its completions."""
    return sum(sum(_sequence_lengths(t, mismatched)) - (_repeated(t, mismatched) if shared else 0) for t in trees)


def _repeated(tree: Tree, mismatched: bool) -> int:
    """Positions of the prompt that only sequences of their own need."""
    return len(tree.prompt) * (len(_branches(tree, mismatched)) - 1)


@dataclass(frozen=True)
class Way:
    """How trees are laid out.

    packed: one row without padding, else a padded row for each completion
    shared: the prompt once for all its completions; only in a packed row
    """

    packed: bool = False
    shared: bool = False

    @property
    def name(self) -> str:
        return "trees" if self.shared else "packed" if self.packed else "padded"

    def layout(self, trees: Sequence[Tree], *, mismatched: bool = False) -> Layout:
        if not self.packed:
            return padded_layout(trees, mismatched=mismatched)
        return tree_layout(trees, mismatched=mismatched, shared=self.shared)

    def positions(self, trees: Sequence[Tree], mismatched: bool = False) -> int:
        """Positions that are forwarded for these trees."""
        if not self.packed:
            return padded_positions(trees, mismatched)
        return packed_positions(trees, mismatched, shared=self.shared)


PADDED, TREES = Way(), Way(packed=True, shared=True)


def plan_step(
    trees: Sequence[Tree], ranks: int, budget: int, *, mismatched: bool = False, way: Way = PADDED
) -> list[list[tuple[int, ...]]]:
    """For each rank its micro-batches, each a tuple of indices into `trees`.

    No micro-batch forwards more than `budget` positions (a tree that is larger runs alone), and the ranks get the same
    number of micro-batches as far as the trees allow, balanced by positions. Where rows are padded, trees of like
    length go together; packed ones fill the budget.
    """

    def cost(members: Sequence[int]) -> int:
        return way.positions([trees[i] for i in members], mismatched)

    if way.packed:
        micro = _fill([cost([i]) for i in range(len(trees))], ranks, budget)
    else:
        order = sorted(range(len(trees)), key=lambda i: (-max(_sequence_lengths(trees[i], mismatched)), i))
        micro = []
        for i in order:
            if micro and cost([*micro[-1], i]) <= budget:
                micro[-1].append(i)
            else:
                micro.append([i])
    _split_to_multiple(micro, ranks, cost)
    return _assign(micro, ranks, cost)


def _fill(costs: Sequence[int], ranks: int, budget: int) -> list[list[int]]:
    """As few micro-batches as first fit finds, their number a multiple of the ranks where that can be, of like cost."""
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    filled: list[list[int]] = []
    load: list[int] = []
    for i in order:
        n = next((n for n, held in enumerate(load) if held + costs[i] <= budget), len(load))
        if n == len(load):
            filled.append([])
            load.append(0)
        filled[n].append(i)
        load[n] += costs[i]
    even: list[list[int]] = [[] for _ in range(min(len(costs), math.ceil(len(filled) / ranks) * ranks))]
    load = [0] * len(even)
    for i in order:
        n = min(range(len(even)), key=lambda n: (load[n], n))
        even[n].append(i)
        load[n] += costs[i]
    fits = all(held <= budget or len(members) == 1 for held, members in zip(load, even, strict=True))
    return even if fits else filled


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
    """Trees laid out for one forward pass.

    S rows of L positions: a padded one (on the right) for each completion, or a single one without padding. N
    completions of at most T tokens; M completion tokens in all. Rows of N follow the trees, a tree's completions in
    order, its mismatched one last.
    """

    input_ids: npt.NDArray[np.int64]  # (S, L)
    attention_mask: npt.NDArray[np.int64]  # (S, L)
    source: npt.NDArray[np.int64]  # (M,) position in the flattened (S * L) that predicts the token
    target: npt.NDArray[np.int64]  # (M,) token ids
    place: npt.NDArray[np.int64]  # (M,) position in the flattened (N * T)
    mask: npt.NDArray[np.bool_]  # (N, T) the tokens that count
    keys: tuple[tuple[int, int], ...]  # (N,) (row of the data set, number of the completion in its tree)
    ends: npt.NDArray[np.int64]  # (N,) position in the flattened (S * L) of each completion's last token
    pieces: int = 1  # into how many pieces the head cuts M at least: the same on all ranks
    position_ids: npt.NDArray[np.int64] | None = None  # (S, L), of a packed row: a completion goes on from its prompt
    nodes: npt.NDArray[np.int32] | None = None  # (n, 2), of a packed row: each node's length, and which one it goes on
    saved: int = 0  # positions that shared prompts spare

    @property
    def positions(self) -> int:
        """Forwarded positions, padding included."""
        return self.input_ids.size

    @property
    def real_positions(self) -> int:
        return int(self.attention_mask.sum())


def _entries(trees: Sequence[Tree], mismatched: bool) -> list[tuple[Tree, int, Completion]]:
    """Each completion with its tree and its number in it. Raises ValueError for a tree without a prompt."""
    for tree in trees:
        if len(tree.prompt) == 0:
            raise ValueError(f"{tree.where}: a tree needs at least one prompt token to predict from")
    return [(t, slot, c) for t in trees for slot, c in enumerate(_branches(t, mismatched))]


def _table(completions: Sequence[Completion]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Which tokens count (N, T), and where each token stands in that table (M,)."""
    longest = max(len(c.ids) for c in completions)
    mask = np.zeros((len(completions), longest), np.bool_)
    for n, completion in enumerate(completions):
        mask[n, : len(completion.ids)] = True if completion.mask is None else completion.mask
    return mask, np.concatenate([n * longest + np.arange(len(c.ids)) for n, c in enumerate(completions)])


def padded_layout(trees: Sequence[Tree], *, mismatched: bool = False) -> Layout:
    """One row per completion: prompt, completion, padding. Padding is token 0 and is never read: masks tell."""
    entries = _entries(trees, mismatched)
    length = max(len(t.prompt) + len(c.ids) for t, _, c in entries)
    ids = np.zeros((len(entries), length), np.int64)
    attention = np.zeros((len(entries), length), np.int64)
    source, target, ends = [], [], []
    for n, (tree, _, completion) in enumerate(entries):
        start, size = len(tree.prompt), len(completion.ids)
        ends.append(n * length + start + size - 1)
        ids[n, :start], ids[n, start : start + size] = tree.prompt, completion.ids
        attention[n, : start + size] = 1
        source.append(n * length + np.arange(start - 1, start + size - 1))
        target.append(completion.ids.astype(np.int64))
    mask, place = _table([c for *_, c in entries])
    keys = tuple((t.row, slot) for t, slot, _ in entries)
    return Layout(ids, attention, np.concatenate(source), np.concatenate(target), place, mask, keys, np.array(ends))


def tree_layout(trees: Sequence[Tree], *, mismatched: bool = False, shared: bool = True) -> Layout:
    """All trees in one row without padding: a prompt, then each of its completions, and so on.

    A completion goes on from its prompt: its positions begin after the prompt's, it sees the prompt and itself, and its
    first token is predicted from the prompt's last position. shared=False: prompt and completion are one node, and the
    prompt is there for each completion.
    """
    entries = _entries(trees, mismatched)
    ids: list[npt.NDArray[Any]] = []
    nodes: list[tuple[int, int]] = []
    positions, source, ends, at, prompt = [], [], [], 0, -1
    for tree, slot, completion in entries:
        start, size = len(tree.prompt), len(completion.ids)
        if slot == 0 or not shared:
            prompt, first = len(nodes), at
            ids.append(tree.prompt)
            nodes.append((start if shared else start + size, -1))
            positions.append(np.arange(start))
            at += start
        if shared:
            nodes.append((size, prompt))
        ids.append(completion.ids)
        positions.append(np.arange(start, start + size))
        source.append(np.array([first + start - 1, *range(at, at + size - 1)]))
        at += size
        ends.append(at - 1)
    mask, place = _table([c for *_, c in entries])
    row = np.concatenate(ids).astype(np.int64)
    return Layout(
        row[None], np.ones((1, at), np.int64), np.concatenate(source),
        np.concatenate([c.ids for *_, c in entries]).astype(np.int64), place, mask,
        tuple((t.row, slot) for t, slot, _ in entries), np.array(ends),
        position_ids=np.concatenate(positions)[None], nodes=np.array(nodes, np.int32),
        saved=sum(_repeated(t, mismatched) for t in trees) if shared else 0,
    )  # fmt: skip
