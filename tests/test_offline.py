"""`alignzoo sample`: completions into a file, interrupted and gone on with, and what a run makes of the file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from test_rollout import online

import alignzoo
from alignzoo import offline
from alignzoo.cli import cli
from alignzoo.errors import AlignzooError
from alignzoo.recipe import load_recipe


@pytest.fixture(autouse=True)
def _few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "_AT_ONCE", 5)
    torch.set_num_threads(1)


def sample(file: Path, out: Path, make: str, *overrides: str) -> list[dict[str, Any]]:
    console = Console(file=io.StringIO(), width=200)
    offline.sample(load_recipe(file, overrides), out, make, [file.parent / "plugin.py"], console)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_ranked_pairs_and_best_are_of_the_same_completions(tiny_folder: Path, tmp_path: Path) -> None:
    file = online(tmp_path, tiny_folder)
    ranked = sample(file, tmp_path / "ranked.jsonl", "ranked")
    assert len(ranked) == 24 and all(len(row["completions"]) == 4 for row in ranked)
    for row in ranked:
        assert row["rewards"] == sorted(row["rewards"], reverse=True)
        assert row["rewards"] == [text.count("e") / max(len(text), 1) for text in row["completions"]]
        assert row["each"] == [{"letter": reward} for reward in row["rewards"]]
    best = sample(file, tmp_path / "best.jsonl", "best")
    assert [row["completion"] for row in best] == [row["completions"][0] for row in ranked]
    pairs = {row["prompt"]: row for row in sample(file, tmp_path / "pairs.jsonl", "pairs")}
    assert 0 < len(pairs) <= 24
    for row in ranked:
        if row["prompt"] in pairs:
            assert pairs[row["prompt"]]["chosen"] == row["completions"][0]
            assert pairs[row["prompt"]]["rejected_reward"] == row["rewards"][-1] < row["rewards"][0]


def test_interrupted_it_goes_on_and_ends_alike(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = online(tmp_path, tiny_folder)
    whole = sample(file, tmp_path / "whole.jsonl", "ranked")
    calls, reward = [0], offline.Answerer.reward

    def dies(self: Any, *words: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return reward(self, *words)

    out = tmp_path / "parts.jsonl"
    monkeypatch.setattr(offline.Answerer, "reward", dies)
    with pytest.raises(KeyboardInterrupt):
        sample(file, out, "ranked")
    assert len(out.read_text().splitlines()) == 10
    with out.open("a") as torn:
        torn.write('{"prompt": "half a li')
    calls[0] = 10
    assert sample(file, out, "ranked") == whole
    assert calls[0] == 13  # three blocks of five were left
    assert sample(file, out, "ranked") == whole and calls[0] == 13


def test_a_file_of_another_command_is_left_alone(tiny_folder: Path, tmp_path: Path) -> None:
    file = online(tmp_path, tiny_folder)
    out = tmp_path / "mine.jsonl"
    out.write_text("precious\n")
    with pytest.raises(AlignzooError, match=r"mine\.jsonl is there already"):
        sample(file, out, "ranked")
    other = tmp_path / "other.jsonl"
    sample(file, other, "best")
    for change in ("rollout.completions=3", "train.seed=7", "rewards.0.weight=2.0"):
        with pytest.raises(AlignzooError, match="another recipe, other data or other plugins"):
            sample(file, other, "best", change)
    with pytest.raises(AlignzooError, match=r"other\.jsonl is there already"):
        sample(file, other, "pairs")
    assert out.read_text() == "precious\n"


def test_what_alpaca_eval_reads(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A JSON list of exactly these four texts, one for each prompt; interrupted and gone on with it is the same."""
    file, out = online(tmp_path, tiny_folder), tmp_path / "outputs.json"
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    rows[0]["dataset"] = "helpful_base"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plugin, console = [tmp_path / "plugin.py"], Console(file=io.StringIO(), width=200)
    best = sample(file, tmp_path / "best.jsonl", "best")
    offline.sample(load_recipe(file), out, "alpaca_eval", plugin, console, "mine")
    found = json.loads(out.read_text())
    assert [list(row) for row in found] == [["instruction", "output", "generator", "dataset"]] * 24
    assert [row["instruction"] for row in found] == [row["prompt"] for row in rows]
    assert [row["output"] for row in found] == [row["completion"].strip() for row in best]
    assert [row["dataset"] for row in found] == ["helpful_base", *["train"] * 23]
    assert {row["generator"] for row in found} == {"mine"}
    whole, calls, reward = out.read_bytes(), [0], offline.Answerer.reward

    def dies(self: Any, *words: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return reward(self, *words)

    monkeypatch.setattr(offline.Answerer, "reward", dies)
    parts = tmp_path / "parts.json"
    with pytest.raises(KeyboardInterrupt):
        offline.sample(load_recipe(file), parts, "alpaca_eval", plugin, console, "mine")
    for _ in range(2):
        offline.sample(load_recipe(file), parts, "alpaca_eval", plugin, console, "mine")
        assert parts.read_bytes() == whole
    with pytest.raises(AlignzooError, match="is there already"):
        offline.sample(load_recipe(file), parts, "alpaca_eval", plugin, console, "another")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": turns}) + "\n")
    with pytest.raises(AlignzooError, match=r"train\.jsonl:1: a conversation"):
        offline.sample(load_recipe(file), tmp_path / "turns.json", "alpaca_eval", plugin, console)


def test_the_words_of_the_command(tiny_folder: Path, tmp_path: Path) -> None:
    file, out = online(tmp_path, tiny_folder), tmp_path / "outputs.json"
    words = ["sample", str(file), "--plugin", str(tmp_path / "plugin.py"), "--out", str(out)]
    alpaca = ["--format", "alpaca_eval"]
    for odd in (["--make", "best", *alpaca], ["--generator", "x"]):
        assert CliRunner().invoke(cli, [*words, *odd]).exit_code == 2
    done = CliRunner().invoke(cli, [*words, *alpaca])
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())[0]["generator"] == str(tiny_folder)


def test_a_run_learns_from_sampled_pairs(tiny_folder: Path, tmp_path: Path) -> None:
    sample(online(tmp_path, tiny_folder), tmp_path / "pairs.jsonl", "pairs")
    table = {
        "loss": {"name": "dpo"}, "model": {"path": str(tiny_folder)}, "data": {"train": str(tmp_path / "pairs.jsonl")},
        "train": {"learning_rate": 1e-3, "batch_size": 4, "max_steps": 2}, "output": {"dir": str(tmp_path / "runs")},
    }  # fmt: skip
    found = alignzoo.run(load_recipe(table), console=Console(file=io.StringIO()))
    assert found.summary["steps"] == 2
