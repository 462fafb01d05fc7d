"""The plan of a run: order, steps, micro-batches, layout."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import make_trees
from hypothesis import given, settings
from hypothesis import strategies as st

from alignzoo.batch import blocks_of, count_steps, padded_layout, padded_positions, plan_step, steps_of
from alignzoo.tree import Completion, Tree


def test_every_row_comes_once_an_epoch_and_no_step_spans_two() -> None:
    steps = list(steps_of(10, 4, 3, None, seed=5))
    assert [len(s.rows) for s in steps] == [4, 4, 2] * 3
    assert [s.step for s in steps] == list(range(1, 10))
    for epoch in range(3):
        rows = [r for s in steps if s.epoch == epoch for r in s.rows]
        assert sorted(rows) == list(range(10))
    orders = [tuple(r for s in steps if s.epoch == e for r in s.rows) for e in range(3)]
    assert len(set(orders)) == 3


def test_the_order_is_the_seeds_and_max_steps_only_cuts_it() -> None:
    whole = list(steps_of(50, 8, 2, None, seed=1))
    assert list(steps_of(50, 8, 2, None, seed=1)) == whole
    assert list(steps_of(50, 8, 2, 5, seed=1)) == whole[:5]
    assert list(steps_of(50, 8, 2, None, seed=2)) != whole
    assert len(whole) == count_steps(50, 8, 2, None) == 14


def test_the_order_is_fixed_for_ever() -> None:
    """A new numpy or a new formula must not change the data order of an old recipe."""
    assert next(steps_of(10, 10, 1, None, seed=42)).rows == (5, 6, 0, 7, 3, 2, 4, 9, 1, 8)


def test_blocks() -> None:
    trees = make_trees(5)
    assert blocks_of(trees, 2) == [trees[:2], trees[2:4], trees[4:]]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 30), ranks=st.integers(1, 4), budget=st.integers(1, 300), seed=st.integers(0, 99))
def test_a_plan_holds_each_tree_once_within_the_budget(n: int, ranks: int, budget: int, seed: int) -> None:
    trees = make_trees(n, seed)
    plan = plan_step(trees, ranks, budget)
    assert len(plan) == ranks
    micro = list(itertools.chain.from_iterable(plan))
    assert sorted(i for m in micro for i in m) == list(range(n))
    for members in micro:
        cost = padded_positions([trees[i] for i in members])
        assert cost <= budget or len(members) == 1
    counts = [len(of_rank) for of_rank in plan]
    assert max(counts) - min(counts) <= 1
    if n >= ranks:
        assert min(counts) >= 1
    assert plan == plan_step(trees, ranks, budget)


def test_like_lengths_go_together() -> None:
    rng = np.random.default_rng(0)

    def tree(row: int, length: int) -> Tree:
        completions = tuple(Completion(rng.integers(3, 9, length).astype(np.int32)) for _ in range(2))
        return Tree(row, np.array([1], np.int32), completions)

    trees = [tree(row, length) for row, length in enumerate([40, 4, 40, 4, 40, 4])]
    plan = plan_step(trees, 1, 6 * 41)
    assert sorted(tuple(sorted(m)) for m in plan[0]) == [(0, 2, 4), (1, 3, 5)]


def test_the_layout_says_which_position_predicts_which_token() -> None:
    tree = Tree(
        7,
        np.array([10, 11, 12], np.int32),
        (Completion(np.array([20, 21], np.int32)), Completion(np.array([30], np.int32))),
        mismatched=Completion(np.array([40, 41, 42], np.int32), np.array([False, True, True])),
    )
    layout = padded_layout([tree])
    assert layout.input_ids.tolist() == [[10, 11, 12, 20, 21], [10, 11, 12, 30, 0]]
    assert layout.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert layout.source.tolist() == [2, 3, 7]  # the last prompt token predicts the first completion token
    assert layout.target.tolist() == [20, 21, 30]
    assert layout.place.tolist() == [0, 1, 2]
    assert layout.mask.tolist() == [[True, True], [True, False]]
    assert layout.keys == ((7, 0), (7, 1))
    whole = padded_layout([tree], mismatched=True)
    assert whole.keys == ((7, 0), (7, 1), (7, 2))
    assert whole.mask[2].tolist() == [False, True, True]


def test_a_tree_without_a_prompt_token_is_refused() -> None:
    tree = Tree(0, np.array([], np.int32), (Completion(np.array([5], np.int32)),), where="f.jsonl:1")
    with pytest.raises(ValueError, match=r"f\.jsonl:1"):
        padded_layout([tree])
