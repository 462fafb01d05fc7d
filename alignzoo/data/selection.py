"""Choices that are made by content: which rows a weight takes, which are held out, which is mismatched with which.

All of them are functions of a sha256 of the content, so they depend neither on a seed nor on the order of the file, and
a row keeps its side when others are added.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from alignzoo.data.rows import Example, content_hash
from alignzoo.errors import DataError
from alignzoo.tree import Completion, Tree


@dataclass(frozen=True, slots=True)
class Kept:
    """A row that became a tree."""

    tree: Tree
    prompt_key: bytes  # the same for two rows with the same prompt
    times: int = 1  # how often the row counts
    asked: str = ""  # the last turn of the prompt, for people to read


def times(example: Example, weight: float) -> int:
    """How often a row counts under a weight: its whole part, and once more for the fraction that the hash picks."""
    whole = math.floor(weight)
    if whole == weight:
        return whole
    digest = content_hash(example.prompt, example.completions, example.label, salt="weight")
    return whole + (int.from_bytes(digest[:8]) < (weight - whole) * 2**64)


def hold_out(rows: Sequence[Kept], fraction: float) -> tuple[list[Kept], list[Kept]]:
    """Training and held-out rows, by prompt: all rows of a prompt are on one side. Each side has at least one row.

    Held-out rows count once, whatever their weight. Raises DataError where there is but one prompt.
    """
    sizes = Counter(row.prompt_key for row in rows)
    if len(sizes) < 2:
        raise DataError(
            "data.eval_fraction: no rows can be held out, since all of them have the same prompt",
            fix="name held-out rows in data.eval, or set data.eval_fraction = 0",
        )
    target = max(1, round(fraction * len(rows)))
    order = sorted(sizes, key=lambda key: content_hash(key.hex(), salt="eval"))
    held: set[bytes] = set()
    count = 0
    for key in order:
        if count + sizes[key] <= target and len(held) < len(sizes) - 1:
            held.add(key)
            count += sizes[key]
    if not held:
        held = {min(order, key=sizes.__getitem__)}
    train = [row for row in rows if row.prompt_key not in held]
    return train, [replace(row, times=1) for row in rows if row.prompt_key in held]


def numbered(rows: Sequence[Kept]) -> list[Tree]:
    """The trees of all rows, each as often as it counts, numbered from 0."""
    trees = [row.tree for row in rows for _ in range(row.times)]
    return [replace(tree, row=i) for i, tree in enumerate(trees)]


def with_mismatched(rows: Sequence[Kept], max_length: int, name: str, cut: Counter[str]) -> list[Kept]:
    """Each row with the first completion of the row that follows it, in the order of content, with another prompt.

    A completion that would not fit into max_length after this row's prompt is cut at its end and counted in `cut`.
    Raises DataError where there are fewer than two prompts.
    """
    keys = [content_hash(row.prompt_key.hex(), *_all_ids(row.tree)) for row in rows]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    ring = [rows[i] for i in order]
    jumps = _next_other([row.prompt_key for row in ring])
    found: list[Kept | None] = [None] * len(rows)
    for place, index in enumerate(order):
        found[index] = _mismatch(ring, jumps, place, max_length, name, cut)
    return [row for row in found if row is not None]


def _all_ids(tree: Tree) -> list[list[int]]:
    return [tree.prompt.tolist(), *(completion.ids.tolist() for completion in tree.completions)]


def _next_other(keys: Sequence[bytes]) -> list[int]:
    """For each place of the ring the next one with another key; its own place where all keys are the same."""
    n = len(keys)
    jumps = [0] * n
    after = 0  # places from the current one to the next with another key, going backwards twice round the ring
    for i in range(2 * n - 1, -1, -1):
        here, following = keys[i % n], keys[(i + 1) % n]
        after = 1 if here != following else min(after + 1, n)
        jumps[i % n] = (i + after) % n
    return jumps


def _mismatch(
    ring: Sequence[Kept], jumps: Sequence[int], place: int, max_length: int, name: str, cut: Counter[str]
) -> Kept:
    row, at = ring[place], jumps[place]
    for _ in range(len(ring)):
        other = ring[at]
        if other.prompt_key == row.prompt_key:
            at = jumps[at]
            continue
        if not _same_prompt(row.tree, other.tree):
            whole = _own(other.tree.completions[0])
            room = max_length - len(row.tree.prompt)
            if len(whole.ids) > room:
                whole = Completion(whole.ids[:room].copy())
                cut["mismatched-right"] += 1
            return replace(row, tree=replace(row.tree, mismatched=whole))
        at = (at + 1) % len(ring)
    raise DataError(
        f"{name}: {row.tree.where} has no row with another prompt to take a mismatched completion from",
        why="the loss compares each row with the completion of another prompt",
        fix="use data with at least two prompts",
    )


def _same_prompt(a: Tree, b: Tree) -> bool:
    """Cut at their start, two prompts may have become the same."""
    return np.array_equal(a.prompt, b.prompt)


def _own(completion: Completion) -> Completion:
    """A completion without the tokens that belong to its prompt."""
    return completion if completion.mask is None else Completion(completion.ids[completion.mask].copy())
