"""The built-in rewards that read texts alone, against values worked by hand and the libraries they stand on."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from reward_helpers import SMALL

from alignzoo.errors import PluginError, RecipeError
from alignzoo.plugins import discover
from alignzoo.recipe import load_recipe
from alignzoo.rewards import make_rewards


def value(name: str, completion: str, columns: dict[str, Any] | None = None, **settings: Any) -> Any:
    reward = discover().reward(name).cls(**settings)
    (found,) = reward(["p"], [completion], **{k: [v] for k, v in (columns or {}).items()})
    return found


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer", "settings", "expected"),
    [
        ("Paris", "Paris", {}, 1.0), ("Paris.", " paris ", {}, 1.0), ("the  city\n of Paris",
        "The city of Paris", {}, 1.0),
        ("London", "Paris", {}, 0.0), ("", "Paris", {}, 0.0), ("", "", {}, 1.0), ("Paris is it", "Paris", {}, 0.0),
        ("Paris", "paris", {"ignore_case": False}, 0.0), ("a.", "a", {"ignore_punctuation": False}, 0.0),
        ("ﬁn", "fin", {}, 1.0), ("\uff30aris", "paris", {}, 1.0), ("STRASSE", "straße", {}, 1.0), ("日本",
        "日本", {}, 1.0),
        ("cafe\u0301", "caf\u00e9", {}, 1.0), ("b", ["a", "b"], {}, 1.0), ("c", ["a", "b"], {}, 0.0),
        ("42", 42, {}, 1.0),
        ("x", None, {}, None), ("I think #### 7", "so 3 + 4 #### 7", {"after": "####"}, 1.0),
        ("20 is less than 36.", "36", {"find": r"\d+"}, 1.0), ("36 is more than 20.", "36", {"find": r"\d+"}, 0.0),
        ("neither", "36", {"find": r"\d+"}, 0.0),
        ("36 is more than 20.", "36", {"find": r"\A\D*(\d+)"}, 1.0), ("20, not 36", "36", {"find": r"\A\D*(\d+)"}, 0.0),
        ("b", "b", {"find": "(a)|b"}, 0.0), ("7", "so #### 7", {"after": "####"}, 1.0),
        ("#### 7 #### 8", "7", {"after": "####"}, 0.0),
    ],
)  # fmt: skip
def test_exact(completion: str, answer: Any, settings: dict[str, Any], expected: float | None) -> None:
    assert value("exact", completion, {"answer": answer}, **settings) == expected
    assert value("exact", completion, {"solution": answer, "answer": "-"}, answer="solution", **settings) == expected


# --- format, length ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "pattern", "match", "expected"),
    [
        ("<a>x\ny</a>", "<a>.*</a>", "full", 1.0), ("so <a>x</a>", "<a>.*</a>", "full", 0.0),
        ("so <a>x</a>!", "<a>.*</a>", "search", 1.0), ("", "", "full", 1.0), ("", ".+", "search", 0.0),
        ("é", r"\w", "full", 1.0), ("x\n", "x", "full", 0.0),
    ],
)  # fmt: skip
def test_format(completion: str, pattern: str, match: str, expected: float) -> None:
    assert value("format", completion, pattern=pattern, match=match) == expected


def test_a_wrong_expression_has_its_place(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r'\[rewards.0\] reward "format": pattern = .*is no regular expression'):
        make_rewards(load_recipe({**SMALL, "rewards": [{"name": "format", "pattern": "("}]}), discover())


@pytest.mark.parametrize(
    ("completion", "settings", "expected"),
    [
        ("a b c d", {"target": 4}, 1.0), ("a b", {"target": 4}, 0.5), ("a b c d e", {"target": 4}, 0.75),
        ("", {"target": 4}, 0.0),
        ("a " * 100, {"target": 4}, 0.0), ("a b c d e", {"target": 4, "tolerance": 1}, 1.0),
        ("a b", {"target": 4, "tolerance": 1}, 0.75), ("日本語", {"target": 3, "unit": "characters"}, 1.0),
        ("a\n\tb  c", {"target": 3}, 1.0),
    ],
)  # fmt: skip
def test_length(completion: str, settings: dict[str, Any], expected: float) -> None:
    assert value("length", completion, **settings) == expected


# --- TRL's ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "settings", "expected"),
    [
        ("a b c d", {"ngram": 2}, 0.0), ("a a a a a", {"ngram": 2}, -0.75), ("", {}, 0.0), ("a b", {}, 0.0),
        ("a b a b", {"ngram": 2, "penalty": -3.0}, -1.0),  # ab ba ab: 2 of 3 are new
        ("aaaa", {"ngram": 1, "unit": "characters"}, -0.75), ("été été", {"ngram": 1}, -0.5),
    ],
)  # fmt: skip
def test_repetition(completion: str, settings: dict[str, Any], expected: float) -> None:
    assert value("repetition", completion, **settings) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [("<think>a\nb</think>c", 1.0), ("<think>a", 0.0), ("x <think>a</think>", 0.0), ("", 0.0)],
)
def test_think(completion: str, expected: float) -> None:
    assert value("think", completion) == expected


# --- numeric ----------------------------------------------------------------------------------------------------------


def test_numeric_against_answers_of_many_forms() -> None:
    pytest.importorskip("math_verify")
    cases: list[tuple[Any, str, float | None]] = [
        ("Natalia sold 48/2 = 24.\n#### 72", "24 and 48 make 72.\n#### 72", 1.0), ("... #### 72",
        "The answer is 72.", 1.0),
        ("#### 72", "It is 72, or so I thought. #### 71", 0.0), ("#### 70,000", "a profit of $70000", 1.0),
        ("#### 70000", "#### 70,000", 1.0), ("#### -3", "#### -3.0", 1.0), ("#### 5", "", 0.0), ("#### 5",
        "no idea", 0.0),
        ("#### 6", r"\boxed{5}? No. #### 6", 1.0), (r"\frac{1}{2}", r"So \boxed{0.5}", 1.0), (r"3\pi",
        r"\boxed{3\pi}", 1.0), (r"3\pi", r"\boxed{3}", 0.0),
        ("$x^2+2x+1$", r"\boxed{(x+1)^2}", 1.0), ("x^2+1", r"\boxed{x^2-1}", 0.0), (0.5, "1/2", 1.0), (None, "5", None),
        ("", "5", None), ("#### 42", "die Antwort: 42 €, 日本", 1.0),
    ]  # fmt: skip
    reward = discover().reward("numeric").cls()
    answers, completions, expected = zip(*cases, strict=True)
    assert reward(["p"] * len(cases), list(completions), answer=list(answers)) == list(expected)
    assert reward(["p"], ["6"], answer=["#### 6"]) == [1.0]  # its process is still there


def test_numeric_gives_up_a_number_that_cannot_be_computed() -> None:
    pytest.importorskip("math_verify")
    reward = discover().reward("numeric").cls(seconds=1.0)
    started = time.monotonic()
    endless = r"\boxed{9^{9^{9^{9^{9}}}}}"
    assert reward(["p"] * 3, ["5", endless, "5"], answer=["5", "5", "5"]) == [1.0, 0.0, 1.0]
    assert time.monotonic() - started < 20


def test_numeric_ends_a_process_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, sys, time\n"
        "for line in sys.stdin:\n"
        "    asked = json.loads(line)\n"
        "    if asked['completion'] == 'hang': time.sleep(60)\n"
        "    if asked['completion'] == 'crash': sys.exit(3)\n"
        "    print(json.dumps({'value': 0.5}), flush=True)\n"
    )
    monkeypatch.setattr("alignzoo_rewards.numeric.WORKER", worker)
    reward = discover().reward("numeric").cls(seconds=0.5)
    started = time.monotonic()
    first, hung, crashed, last = reward(["p"] * 4, ["a", "hang", "crash", "b"], answer=["1"] * 4)
    assert (first, hung, last) == (0.5, 0.0, 0.5) and "ended with code 3" in str(crashed)
    assert time.monotonic() - started < 20


def test_numeric_in_a_process_that_dies() -> None:
    pytest.importorskip("math_verify")
    reward = discover().reward("numeric").cls()
    assert reward(["p"], ["5"], answer=["5"]) == [1.0]
    reward._worker.terminate()
    reward._worker.wait()
    assert reward(["p"], ["5"], answer=["5"]) == [1.0]


@pytest.mark.parametrize(("name", "module", "extra"), [
    ("numeric", "math_verify", "math"), ("reasoning_gym", "reasoning_gym", "gym"),
])  # fmt: skip
def test_an_extra_that_is_not_installed(name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))
    with pytest.raises(RecipeError) as caught:
        make_rewards(load_recipe({**SMALL, "rewards": [{"name": name}]}), discover())
    assert f"pip install 'alignzoo[{extra}]'" in str(caught.value) and "is not installed" in str(caught.value)


def test_a_row_of_gsm8k_through_the_whole_way() -> None:
    pytest.importorskip("math_verify")
    recipe = load_recipe(
        {**SMALL, "rewards": [{"name": "numeric"}, {"name": "format", "pattern": r".*#### -?[\d,.]+"}]}
    )
    rewards = make_rewards(recipe, discover())
    rewards.check_columns(["question", "answer"])
    answer = "She makes 9 * 2 = $<<9*2=18>>18 every day at the farmer\u2019s market.\n#### 18"
    scored = rewards.score(["q"] * 3, [answer, "18", "#### 17"], {"question": ["q"] * 3, "answer": [answer] * 3})
    assert scored.total == [2.0, 1.0, 1.0] and scored.each["numeric"] == [1.0, 1.0, 0.0]


# --- reasoning-gym ----------------------------------------------------------------------------------------------------


def test_reasoning_gym_scores_its_own_tasks() -> None:
    gym = pytest.importorskip("reasoning_gym")
    rows = list(gym.create_dataset("basic_arithmetic", size=3, seed=1))
    columns: dict[str, Any] = {key: [row[key] for row in rows] for key in ("question", "answer", "metadata")}
    reward = discover().reward("reasoning_gym").cls()
    completions = [f"I say <answer>{rows[0]['answer']}</answer>", "<answer>nonsense</answer>", rows[2]["answer"]]
    right, wrong, untagged = reward(["q"] * 3, completions, **columns)
    assert right == 1.0 and wrong < 0.5 and untagged < 0.5
    columns["metadata"] = [json.dumps(row["metadata"]) for row in rows]
    assert reward(["q"] * 3, completions, **columns) == [right, wrong, untagged]
    bare = discover().reward("reasoning_gym").cls(tag="")
    assert bare(["q"] * 3, completions, **columns)[2] == 1.0


# --- all of them ------------------------------------------------------------------------------------------------------


def test_the_built_in_rewards_come_through_their_own_entry_point() -> None:
    rewards = discover().rewards()
    assert {info.label for info in rewards.values() if info.distribution == "alignzoo"} == {"builtin-rewards"}
    for info in rewards.values():
        text = sys.modules[info.cls.__module__].__doc__ or ""
        assert text and (info.cls.__doc__ or "").strip()


def test_no_value_depends_on_the_other_completions() -> None:
    texts = ["a b c", "", "<think>x</think> 42", "a a a a a a"]
    for name, settings in (
        ("exact", {}), ("format", {"pattern": "a.*"}), ("length", {"target": 3}), ("repetition",
        {"ngram": 1}), ("think", {}),
    ):  # fmt: skip
        reward = discover().reward(name).cls(**settings)
        together = reward(["p"] * 4, texts, answer=["a b c"] * 4)
        assert together == [value(name, text, {"answer": "a b c"}, **settings) for text in texts]


def test_settings_out_of_bounds() -> None:
    with pytest.raises(PluginError, match="target = 0 is out of range"):
        discover().reward("length").cls(target=0)
