"""`alignzoo data agreement`: Cohen's kappa, gold rows, answers that are too fast."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from alignzoo.cli import cli

pytest.importorskip("sklearn", reason="the extra agreement is not installed")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def compare(path: str, *words: str, annotators: str = "a,b", code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["data", "agreement", path, "--annotators", annotators, "--json", *words])
    assert result.exit_code == code, result.output
    return dict(json.loads(result.stdout))


def kappa(a: list[str], b: list[str]) -> float:
    """By its definition: (p_o - p_e) / (1 - p_e)."""
    n = len(a)
    equal = sum(x == y for x, y in zip(a, b, strict=True)) / n
    chance = sum(Counter(a)[label] * Counter(b)[label] for label in {*a, *b}) / n**2
    return (equal - chance) / (1 - chance)


def test_kappa_by_hand(tmp_path: Path) -> None:
    """20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: agreement 0.7, chance 0.5, kappa 0.4."""
    rows = [{"a": a, "b": b} for a, b, n in (
        ("yes", "yes", 20), ("yes", "no", 5), ("no", "yes", 10), ("no", "no", 15)) for _ in range(n)]  # fmt: skip
    found = compare(write(tmp_path / "a.jsonl", rows))
    pair = found["pairs"][0]
    assert pair["agreement"] == pytest.approx(0.7) and pair["kappa"] == pytest.approx(0.4) and pair["items"] == 50
    assert found["warnings"] == ["kappa of a and b is 0.40, below 0.6"]
    assert pair["disagreements"][0].endswith("a.jsonl:21: a yes, b no") and len(pair["disagreements"]) == 10
    compare(str(tmp_path / "a.jsonl"), "--strict", code=1)


def test_three_annotators_and_several_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(200):
        true = str(rng.choice(["chosen", "rejected", "tie"]))
        rows.append({name: true if rng.random() < 0.9 else "tie" for name in "abc"} | {"gold": true})
    found = compare(write(tmp_path / "a.jsonl", rows), annotators="a, b, c")
    assert [(pair["a"], pair["b"]) for pair in found["pairs"]] == [("a", "b"), ("a", "c"), ("b", "c")]
    for pair in found["pairs"]:
        wanted = kappa([row[pair["a"]] for row in rows], [row[pair["b"]] for row in rows])
        assert pair["kappa"] == pytest.approx(wanted) and wanted > 0.6
    for one in found["annotators"]:
        assert one["gold"] == 200 and one["right"] == sum(row[one["name"]] == row["gold"] for row in rows)
    assert found["warnings"] == []


def test_missing_answers_and_gold_labels_do_not_count(tmp_path: Path) -> None:
    rows = [{"a": " Yes ", "b": "yes", "gold": "yes"}, {"a": True, "b": None}, {"a": "no", "b": "", "gold": "yes"},
            {"a": "no", "b": "no", "gold": None}]  # fmt: skip
    found = compare(write(tmp_path / "a.jsonl", rows))
    assert found["pairs"][0]["items"] == 2 and found["pairs"][0]["kappa"] == 1.0
    a, b = found["annotators"]
    assert (a["answers"], a["gold"], a["right"]) == (4, 2, 1) and (b["answers"], b["gold"], b["right"]) == (2, 1, 1)


def test_one_label_alone_has_no_kappa(tmp_path: Path) -> None:
    found = compare(write(tmp_path / "a.jsonl", [{"a": 1, "b": 1}] * 3))
    assert found["pairs"][0]["kappa"] is None and "not defined" in found["warnings"][0]


def test_implausibly_fast_answers(tmp_path: Path) -> None:
    """100 words at 1000 words a minute take 6 seconds."""
    text = " ".join(["word"] * 60)
    rows = [
        {"prompt": text, "chosen": [{"role": "user", "content": " ".join(["word"] * 39)}], "a": "x", "b": "y",
         "a_seconds": seconds, "b_seconds": "30"} for seconds in (5.9, 6.1, 2, None)
    ]  # fmt: skip
    a, b = compare(write(tmp_path / "a.jsonl", rows))["annotators"]
    assert (a["timed"], a["fast"], b["timed"], b["fast"]) == (3, 2, 4, 0)
    assert "a.jsonl:3: 100 words in 2 s" in a["fastest"][0]
    slower = compare(str(tmp_path / "a.jsonl"), "--words-per-minute", "250")
    assert slower["annotators"][0]["fast"] == 3 and "250 words a minute" in slower["warnings"][-1]


def test_a_row_for_each_answer(tmp_path: Path) -> None:
    rows = []
    for i in range(10):
        for name in ("ann", "bob", "eve"):
            label = "good" if i % 2 or (name == "bob" and i == 0) else "bad"
            rows.append({"id": i, "annotator": name, "label": label, "seconds": 3, "gold": "good" if i % 2 else "bad"})
    rows.append({**rows[0], "label": "good"})
    path = write(tmp_path / "a.jsonl", rows)
    found = compare(path, annotators="ann,bob")
    assert found["pairs"][0]["items"] == 10 and found["pairs"][0]["agreement"] == 0.9 and found["again"] == 1
    assert [one["right"] for one in found["annotators"]] == [10, 9]
    assert "1 rows answer an item again" in found["warnings"][0]
    for row in rows:  # without an identifier the text is the item
        row["prompt"] = f"prompt {row.pop('id')}"
    assert compare(write(tmp_path / "b.jsonl", rows), annotators="ann,bob")["pairs"] == [
        {**pair, "disagreements": [line.replace("a.jsonl", "b.jsonl") for line in pair["disagreements"]]}
        for pair in found["pairs"]
    ]
    renamed = [{"who": r["annotator"], "said": r["label"], "about": r["prompt"]} for r in rows]
    words = ["--annotator-column", "who", "--label-column", "said", "--item-column", "about"]
    assert compare(write(tmp_path / "c.jsonl", renamed), *words, annotators="ann,bob")["pairs"][0]["items"] == 10


def test_what_the_terminal_shows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"a": "[red]", "b": "y"}, {"a": "x", "b": "x"}])
    result = CliRunner().invoke(cli, ["data", "agreement", path, "--annotators", "a,b"], env={"COLUMNS": "200"})
    for words in ("Cohen's kappa", "0.333", "50.0%", "[red]", "no gold rows", "no times", "warning: kappa"):
        assert words in result.output, words


@pytest.mark.parametrize(
    ("rows", "words", "said"),
    [
        ([{"a": 1, "anna": 1}], "a,ana", 'no column "ana" (did you mean "anna"?)'),
        ([{"a": 1, "b": None}, {"a": None, "b": 1}], "a,b", "no row in common"),
        ([{"a": 1, "b": None}], "a,b", "no answer of b"),
        ([{"a": 1, "b": 1, "a_seconds": "soon"}], "a,b", "not a number of seconds"),
        ([{"a": 1}], "a", "at least two"),
        ([{"a": 1}], "a,a", "at least two"),
        ([], "a,b", "holds no rows"),
    ],
)
def test_mistakes(rows: list[dict[str, Any]], words: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows)
    result = CliRunner().invoke(cli, ["data", "agreement", path, "--annotators", words])
    assert result.exit_code == 2 and said in result.output, result.output


def test_scikit_learn_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    path = write(tmp_path / "a.jsonl", [{"a": 1, "b": 2}])
    result = CliRunner().invoke(cli, ["data", "agreement", path, "--annotators", "a,b"])
    assert result.exit_code == 2 and "pip install 'alignzoo[agreement]'" in result.output
