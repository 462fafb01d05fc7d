"""Sampled completions into groups, pairs, labelled rows and demonstrations; windows of batches; rows as prompts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignzoo.batch import steps_of, windows_of
from alignzoo.data.dataset import prepare
from alignzoo.errors import DataError
from alignzoo.making import Sampled, make_trees, mismatch, numbered
from alignzoo.recipe import Data, Rollout, Source
from alignzoo.tree import Tree

PROMPT = Tree(3, np.array([5, 6], np.int32), (), where="p.jsonl:4")


def sampled(*rewards: float | None) -> list[Sampled]:
    return [
        Sampled(np.array([10 + i, 2], np.int32), np.full(2, -0.5, np.float32), i == 0, reward=reward)
        for i, reward in enumerate(rewards)
    ]


def firsts(tree: Tree) -> list[int]:
    return [int(c.ids[0]) for c in tree.completions]


def test_groups_keep_everything() -> None:
    (tree,) = make_trees("groups", PROMPT, sampled(1.0, None, -2.0), Rollout())
    assert (tree.row, tree.where, firsts(tree)) == (3, "p.jsonl:4", [10, 11, 12])
    assert tree.rewards is not None
    assert (tree.rewards[0], tree.rewards[2]) == (1.0, -2.0) and math.isnan(tree.rewards[1])
    assert tree.truncated == (True, False, False)
    assert all(c.sampler is not None and c.sampler.tolist() == [-0.5, -0.5] for c in tree.completions)


def test_pairs_are_the_best_against_the_worst() -> None:
    rewards = (0.5, 3.0, None, -1.0, 2.0)
    assert [firsts(t) for t in make_trees("pairs", PROMPT, sampled(*rewards), Rollout())] == [[11, 13]]
    two = make_trees("pairs", PROMPT, sampled(*rewards), Rollout(pairs_per_prompt=5))
    assert [firsts(t) for t in two] == [[11, 13], [14, 10]]  # four with a reward make two pairs
    assert [t.row for t in numbered(two, 100)] == [3, 103]
    gap = make_trees("pairs", PROMPT, sampled(*rewards), Rollout(pairs_per_prompt=5, min_gap=1.5))
    assert [firsts(t) for t in gap] == [[11, 13]]
    assert make_trees("pairs", PROMPT, sampled(1.0, 1.0), Rollout()) == []
    assert make_trees("pairs", PROMPT, sampled(1.0), Rollout()) == []
    same = [Sampled(np.array([4], np.int32), np.zeros(1, np.float32), False, reward=r) for r in (0.0, 1.0)]
    assert make_trees("pairs", PROMPT, same, Rollout()) == []  # the same tokens, whatever they were paid


def test_labels_from_a_threshold_on() -> None:
    trees = make_trees("labelled", PROMPT, sampled(0.5, None, 0.2, 0.7), Rollout(threshold=0.5))
    assert [(firsts(t), t.label) for t in trees] == [([10], True), ([12], False), ([13], True)]
    assert [t.label for t in make_trees("labelled", PROMPT, sampled(-0.1, 0.0), Rollout())] == [False, True]


def test_the_best_one_as_a_demonstration() -> None:
    assert [firsts(t) for t in make_trees("demonstrations", PROMPT, sampled(0.5, 2.0, 2.0), Rollout())] == [[11]]
    assert make_trees("demonstrations", PROMPT, sampled(0.5, 2.0), Rollout(threshold=2.5)) == []
    assert make_trees("demonstrations", PROMPT, sampled(None), Rollout()) == []


def test_mismatched_completions_come_from_another_prompt() -> None:
    other = Tree(9, np.array([7], np.int32), (), where="p.jsonl:9")
    trees = [
        *make_trees("labelled", PROMPT, sampled(1.0, 0.0), Rollout()),
        *make_trees("labelled", other, sampled(1.0), Rollout()),
    ]
    found = [t.mismatched.ids.tolist() for t in mismatch(trees, 3) if t.mismatched is not None]
    assert found == [[10], [10], [10, 2]]  # the first two are cut to one token: their prompt has two of three
    assert mismatch(trees[:2], 9) == []


@pytest.mark.parametrize(("size", "iterations", "total"), [(1, 1, 6), (2, 1, 6), (4, 2, 12), (2, 3, 7), (1, 4, 3)])
def test_windows_go_through_their_batches_again(size: int, iterations: int, total: int) -> None:
    batches = list(steps_of(11, 4, 2, None, seed=0))
    windows = list(windows_of(iter(batches), size, iterations, total))
    steps = [rows for window in windows for rows in window]
    assert [rows.step for rows in steps] == list(range(1, total + 1))
    by_number = {batch.batch: batch.rows for batch in batches}
    assert all(rows.rows == by_number[rows.batch] for rows in steps)
    for window in windows:
        numbers = list(dict.fromkeys(rows.batch for rows in window))
        assert len(numbers) <= size and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert all([r.batch for r in window].count(n) <= iterations for n in numbers)
    assert [w[0].batch for w in windows] == list(range(1, windows[-1][0].batch + 1, size))


# --- rows as prompts


def prepared(path: Path, rows: list[dict[str, Any]], tokenizer: Any, **keys: Any) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data(train=(Source(path=str(path)),), **keys)
    return prepare(data, "prompts", tokenizer, needs_mismatched=False, seed=0, say=lambda _: None)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "one and one?", "answer": "2"}, {"answer": "2"}),
        (
            {"question": "one and one?", "answer": "#### 2"},
            {"question": "one and one?", "answer": "#### 2"},
        ),
        ({"prompt": "one and one?", "chosen": "2", "rejected": "3"}, {"chosen": "2", "rejected": "3"}),
        ({"prompt": "one and one?", "completion": "2", "label": True}, {"completion": "2", "label": True}),
    ],
)
def test_every_kind_of_row_gives_its_prompt(
    tmp_path: Path, tokenizer: Any, row: dict[str, Any], columns: dict[str, Any]
) -> None:
    (tree,) = prepared(tmp_path / "a.jsonl", [row], tokenizer).train
    assert (tree.asked, dict(tree.columns), tree.completions) == ("one and one?", columns, ())
    turns = [{"role": "user", "content": "one and one?"}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert tree.prompt.tolist() == list(expected)


def test_a_conversation_is_asked_up_to_its_last_answer(tmp_path: Path, tokenizer: Any) -> None:
    said = [("user", "hi"), ("assistant", "hello"), ("user", "1 + 1?"), ("assistant", "2")]
    turns = [{"role": role, "content": text} for role, text in said]
    (tree,) = prepared(tmp_path / "a.jsonl", [{"messages": turns, "id": 7}], tokenizer).train
    assert list(tree.asked) == turns[:3] and tree.columns["id"] == 7


def test_prompts_that_leave_no_room_are_dropped_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "short"}, {"prompt": "much longer " * 30}]
    found = prepared(tmp_path / "a.jsonl", rows, tokenizer, max_prompt_length=40)
    assert len(found.train) == 1 and found.report.sources[0].dropped == {"prompt-too-long": 1}
    assert any(line.startswith("prompt tokens") for line in found.report.lines())
    assert not any(line.startswith("completion tokens") for line in found.report.lines())


def test_text_without_a_prompt_cannot_be_asked(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no prompt"):
        prepared(tmp_path / "a.jsonl", [{"text": "Once upon a time"}], tokenizer)
