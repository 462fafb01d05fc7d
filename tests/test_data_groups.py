"""Groups out of files: a prompt, its answers and their rewards. What `alignzoo sample` writes is read again."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console
from runs_helpers import metrics_of, write_recipe
from test_data_prepare import run
from test_data_show import shown
from test_data_tokenizers import chat_tokenizer

import alignzoo
from alignzoo.cli import cli
from alignzoo.data.formats import detect
from alignzoo.data.rows import BadRow
from alignzoo.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": "one", "completions": ["good", "not learned bad"], "rewards": [1, None]},
    {"prompt": "two", "completions": ["question", "good", "good"], "rewards": [-0.5, 2.25, 0]},
]


def groups_file(path: Path, rows: list[dict[str, Any]] | None = None) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS), encoding="utf-8")
    return str(path)


def test_a_row_is_a_tree_with_rewards(tmp_path: Path) -> None:
    for _ in range(2):  # made, then out of the cache
        made = run(source=groups_file(tmp_path / "a.jsonl"), kind="groups", keep=())
        first, second = made.train
        assert first.rewards is not None and first.rewards[0] == 1.0 and math.isnan(first.rewards[1])
        assert second.rewards == (-0.5, 2.25, 0.0) and len(second.completions) == 3
        said = [chat_tokenizer().decode(c.ids) for c in second.completions]
        assert ["question" in said[0], "good" in said[1], said[1] == said[2]] == [True] * 3
        assert first.label is None and first.truncated is None


def test_conversations_and_a_system_column(tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": "one"}], "system": "not learned", "rewards": [1.0, 0.0],
        "completions": [[{"role": "assistant", "content": "good"}], "bad"],
    }  # fmt: skip
    (tree,) = run([row], "groups").train
    assert "not learned" in chat_tokenizer().decode(tree.prompt) and len(tree.completions) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rewards": [1]}, "bad-rewards"),
        ({"rewards": [1, "2"]}, "bad-rewards"),
        ({"rewards": [1, True]}, "bad-rewards"),
        ({"rewards": [1, math.inf]}, "bad-rewards"),
        ({"rewards": [1, 1e39]}, "bad-rewards"),
        ({"rewards": 1}, "bad-rewards"),
        ({"rewards": None}, "missing-column"),
        ({"completions": "good"}, "bad-rewards"),
        ({"completions": [], "rewards": []}, "empty-completion"),
        ({"completions": ["good", " "]}, "empty-completion"),
        ({"completions": ["good", 3]}, "not-text"),
    ],
)
def test_rows_that_are_no_groups(change: dict[str, Any], reason: str) -> None:
    found = detect(list(ROWS[0]), "auto", "x")
    assert found.name == "groups"
    with pytest.raises(BadRow) as problem:
        found.convert({**ROWS[0], **change})
    assert problem.value.reason == reason


@pytest.mark.parametrize("truncation", ["drop", "completion_right"])
def test_two_answers_may_be_the_same(truncation: str) -> None:
    """In a pair they may not: there is nothing to prefer."""
    long = {"prompt": "one", "completions": ["good " * 40, "good " * 41], "rewards": [1, 0]}
    same = {"prompt": "two", "completions": ["good", "good"], "rewards": [1, 0]}
    made = run([long, same], "groups", truncation=truncation, max_length=60)
    assert [len(tree.completions) for tree in made.train] == ([2, 2] if truncation == "completion_right" else [2])


def test_the_prompts_of_groups_can_be_answered_anew() -> None:
    made = run(ROWS, "prompts")
    assert [tree.asked for tree in made.train] == ["one", "two"] and made.train[0].rewards is None


def test_what_holds_no_groups_is_told_so() -> None:
    with pytest.raises(DataError, match=r"(?s)holds pairs, and the loss wants groups.*completions and the reward of"):
        run([{"prompt": "a", "chosen": "b", "rejected": "c"}], "groups")
    with pytest.raises(DataError, match=r"holds groups, and the loss wants pairs"):
        run(ROWS, "pairs")


def test_they_are_shown_and_linted(tmp_path: Path) -> None:
    file = groups_file(tmp_path / "a.jsonl")
    text = shown(file)
    assert all(word in text for word in ("groups", "reward", "2.25", "nan", "not learned bad"))
    result = CliRunner().invoke(cli, ["data", "lint", "--json", file])
    assert result.exit_code == 0, result.output
    found = {finding["id"] for finding in json.loads(result.stdout)["findings"]}
    assert not found & {"near-identical-pair", "pair-languages", "contradiction", "length-bias"}


def test_a_run_learns_from_a_file_of_groups(tiny_folder: Path, tmp_path: Path) -> None:
    """Ranked answers without sampling, held-out ones too: the reward of each shop answer is 1 or 0."""
    file = write_recipe(tmp_path, tiny_folder, loss__name="rrhf", loss__nll_weight=0.01, samples__from_eval=0)
    for part in ("train", "eval"):
        path = tmp_path / f"{part}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        groups_file(
            path,
            [{"prompt": r["prompt"], "completions": [r["rejected"], r["chosen"], "No."], "rewards": [0, 1, None]}
             for r in rows],
        )  # fmt: skip
    records = metrics_of(alignzoo.run(file, console=Console(file=io.StringIO())).run_dir)
    losses = [r["rank_loss"] for r in records if "rank_loss" in r]
    assert len(losses) == 12 and losses[-1] < losses[0]
    held_out = [r["eval_rank_accuracy"] for r in records if "eval_rank_accuracy" in r]
    assert held_out and all(0 <= share <= 1 for share in held_out)
