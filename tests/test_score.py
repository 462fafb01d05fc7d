"""`alignzoo score`: log-probs against a plain forward pass, and what follows from them; categories, conditions."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import REPO, tiny_llama
from rich.console import Console

from alignzoo.cli import cli
from alignzoo.errors import AlignzooError
from alignzoo.expression import Expression
from alignzoo.score import NUMBERS, Asked, score

Rows = list[dict[str, Any]]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    lines = (REPO / "recipes/data/shop_eval.jsonl").read_text(encoding="utf-8").splitlines()[:9]
    rows = [{**json.loads(line), "kind": "ab"[i % 2], "nested": {"i": i}} for i, line in enumerate(lines)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def other_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    tiny_llama(seed=1, vocabulary=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def scored(asked: Asked, out: Path) -> tuple[Rows, str]:
    said = io.StringIO()
    score(asked, out, ["engine.device=cpu"], Console(file=said, width=200))
    return [json.loads(line) for line in out.read_text().splitlines()], said.getvalue()


def by_hand(folder: Path, tokenizer: Any, row: dict[str, Any], side: str) -> tuple[float, int]:
    """The summed log-prob of an answer, and its tokens, by a plain pass of transformers in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    assert whole[: len(prompt)] == prompt
    with torch.no_grad():
        logps = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    picked = [logps[i - 1, whole[i]].item() for i in range(len(prompt), len(whole))]
    return sum(picked), len(picked)


def test_numbers_of_a_plain_forward_pass(
    pairs: Path, tiny_folder: Path, other_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    rows, _ = scored(Asked(str(pairs), str(tiny_folder), str(other_folder), beta=0.05), tmp_path / "out.jsonl")
    assert [row["nested"]["i"] for row in rows] == list(range(9))
    for row in rows[:3]:
        found, rewards = row["scores"], []
        for side in ("chosen", "rejected"):
            policy, tokens = by_hand(tiny_folder, tokenizer, row, side)
            reference, _ = by_hand(other_folder, tokenizer, row, side)
            assert found[f"{side}_logp"] == pytest.approx(policy, abs=2e-3)
            assert found[f"{side}_reference_logp"] == pytest.approx(reference, abs=2e-3)
            assert found[f"{side}_tokens"] == tokens
            assert found[f"{side}_reward"] == pytest.approx(0.05 * (policy - reference), abs=2e-4)
            rewards.append(0.05 * (policy - reference))
        assert found["margin"] == pytest.approx(rewards[0] - rewards[1], abs=4e-4)
        assert found["probability"] == pytest.approx(1 / (1 + math.exp(-found["margin"])))
        assert found["uncertainty"] == pytest.approx(1 - 2 * abs(found["probability"] - 0.5))


def test_without_a_reference_rewards_are_log_probs_per_token(pairs: Path, tiny_folder: Path, tmp_path: Path) -> None:
    rows, _ = scored(Asked(str(pairs), str(tiny_folder)), tmp_path / "out.jsonl")
    for row in rows:
        found = row["scores"]
        assert found["chosen_reward"] == pytest.approx(found["chosen_logp"] / found["chosen_tokens"])
        assert "chosen_reference_logp" not in found


def test_accuracy_by_category_and_its_mean(pairs: Path, tiny_folder: Path, tmp_path: Path) -> None:
    rows, said = scored(Asked(str(pairs), str(tiny_folder), by="kind"), tmp_path / "out.jsonl")
    right = {k: [row["scores"]["margin"] > 0 for row in rows if row["kind"] == k] for k in "ab"}
    shares = {k: sum(found) / len(found) for k, found in right.items()}
    for name, count, share in (
        ("a", 5, shares["a"]), ("b", 4, shares["b"]), ("mean", 2, sum(shares.values()) / 2),
        ("all", 9, (sum(right["a"]) + sum(right["b"])) / 9),
    ):  # fmt: skip
        line = next(line for line in said.splitlines() if line.replace("│", " ").split()[:1] == [name])
        assert line.replace("│", " ").split() == [name, str(count), f"{share:.3f}"]
    with pytest.raises(AlignzooError, match='no column "sort"'):
        scored(Asked(str(pairs), str(tiny_folder), by="sort"), tmp_path / "other.jsonl")
    assert not (tmp_path / "other.jsonl").exists()


def test_what_is_kept_and_the_second_time_from_the_cache(
    pairs: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNZOO_CACHE", str(tmp_path / "cache"))
    every, said = scored(Asked(str(pairs), str(tiny_folder)), tmp_path / "all.jsonl")
    assert "0 of 18 completions from the cache, 18 computed" in said
    middle = sorted(abs(row["scores"]["margin"]) for row in every)[4]
    keep = Expression(f"abs(margin) > {middle!r}", NUMBERS)
    kept, said = scored(Asked(str(pairs), str(tiny_folder), keep=keep), tmp_path / "kept.jsonl")
    assert "18 of 18 completions from the cache, 0 computed" in said and "4 rows, 5 left out" in said
    assert kept == [row for row in every if abs(row["scores"]["margin"]) > middle]
    unsure, _ = scored(Asked(str(pairs), str(tiny_folder), most=3), tmp_path / "unsure.jsonl")
    assert unsure == sorted(every, key=lambda row: -row["scores"]["uncertainty"])[:3]


def test_a_file_is_never_overwritten(pairs: Path, tiny_folder: Path, tmp_path: Path) -> None:
    command = ["score", str(pairs), "--model", str(tiny_folder), "--out", str(pairs)]
    before, result = pairs.read_text(), CliRunner().invoke(cli, command)
    assert result.exit_code == 2 and "is there already" in result.output
    assert pairs.read_text() == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a > 1", True), ("abs(b) >= 3 and not a < 0", True), ("min(a, b) + 1 == -2 or a / 0 > 1", True),
        ("1 < a < 2", False), ("-a * 2 - b < 0", True), ("max(a, b) != a", False),
    ],
)  # fmt: skip
def test_conditions(text: str, expected: bool) -> None:
    assert Expression(text, ("a", "b")).holds({"a": 2.0, "b": -3.0}) is expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("margn > 1", 'did you mean "margin"'), ("margin > ", "cannot be read"), ("__import__('os')", "no condition"),
        ("margin.real > 1", "no condition"), ("margin or margn", 'names "margn"'), ("'a' == 'a'", "no condition"),
        ("[margin]", "no condition"), ("abs(margin, key=1)", "no condition"), ("margin ** 9 > 1", "no condition"),
    ],
)  # fmt: skip
def test_what_is_no_condition_is_refused(text: str, words: str) -> None:
    with pytest.raises(AlignzooError, match=words):
        Expression(text, ("margin",))
