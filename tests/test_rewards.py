"""Rewards at work: called with a time limit, their failures counted, their values summed."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from reward_helpers import SMALL, Case, case, plugin

from alignzoo.errors import AlignzooError, PluginError, RecipeError, RunError
from alignzoo.rewards import WINDOW, Scored

__all__ = ["case", "plugin"]  # fixtures


# --- scoring ----------------------------------------------------------------------------------------------------------


def test_the_total_is_the_weighted_sum_of_those_that_apply(case: Case) -> None:
    scored = case.score({"name": "words", "weight": 10}, {"name": "odd", "weight": -2.5}, "nothing", "ones")
    assert scored.each == {"words": [1.0, 2.0], "odd": [None, 1.0], "nothing": [None, None], "ones": [1.0, 1.0]}
    assert scored.total == [11.0, 18.5] and scored.failed == dict.fromkeys(scored.each, 0) and scored.messages == {}
    assert case.score("nothing").total == [None, None] and case.score("odd").total == [None, 1.0]
    assert case.score().total == [None, None] and case.said == []


def test_a_weight_of_zero_is_only_logged(case: Case) -> None:
    scored = case.score({"name": "words", "weight": 0}, "odd")
    assert scored.total == [None, 1.0] and scored.each["words"] == [1.0, 2.0]


def test_no_completions(case: Case) -> None:
    assert case.make("ones", "words").score([], [], {}) == Scored(
        [], {"ones": [], "words": []}, {"ones": 0, "words": 0}, {}
    )


@pytest.mark.parametrize("name", ["array", "tensor", "true"])
def test_arrays_tensors_and_truth_are_numbers(case: Case, name: str) -> None:
    values = case.score(name).each[name]
    assert values == [1.0, 1.0] and all(type(value) is float for value in values)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("few", "returned 1 values for 2 completions"), ("nan", "returned nan, which is no finite number"),
        ("infinite", "returned inf, which"), ("text", 'returned "1", which is no'), ("bare", "returned float, not a"),
    ],
)  # fmt: skip
def test_what_breaks_the_contract_stops_the_run(case: Case, name: str, message: str) -> None:
    with pytest.raises(PluginError, match=f'reward "{name}" {message}') as caught:
        case.score({"name": name, "max_failures": 1.0})
    assert "mine.py" in caught.value.why


def test_lengths_have_to_fit(case: Case) -> None:
    with pytest.raises(ValueError, match="2 completions, and prompts has 1, answer has 3"):
        case.make("ones").score(["p"], ["a", "b"], {"answer": [1, 2, 3]})


def test_rewards_cannot_spoil_what_the_others_get(case: Case) -> None:
    completions = ["one", "two words"]
    scored = case.make("spoils", "words").score(["p", "p"], completions, {})
    assert scored.each["words"] == [1.0, 2.0] and len(completions) == 2


def test_async_rewards_run_at_the_same_time(case: Case) -> None:
    started = time.monotonic()
    scored = case.score("soon", {"name": "later"}, {"name": "later"}, "ones")
    assert scored.total == [12.0, 12.0] and list(scored.each) == ["soon", "later", "later_2", "ones"]
    assert time.monotonic() - started < 0.8


# --- columns ----------------------------------------------------------------------------------------------------------


def test_columns_arrive_by_name(case: Case) -> None:
    assert case.score("same", answer=["one", "three"]).total == [1.0, 0.0]
    assert case.score("maybe", answer=["a", "b"]).total == [1.0, 1.0] and case.score("maybe").total == [0.0, 0.0]
    assert case.score("closed", answer=["a", "b"]).total == [
        2.0,
        2.0,
    ]  # without **columns it gets what it names
    assert case.score("names", **{"a": [1, 2], "not a name!": [3, 4]}).total == [2.0, 2.0]


def test_names_that_clash_are_left_out_and_said_once(case: Case) -> None:
    rewards = case.make("names", {"name": "factor", "by": 3.0})
    columns = {"prompts": [1, 2], "completions": [1, 2], "self": [1, 2], "by": [1, 2]}
    for _ in range(2):
        assert rewards.score(["p", "p"], ["a", "b"], columns).total == [4.0, 4.0]  # names sees one, factor gives 3
    assert case.said == [
        f'WARNING: reward "{name}" does not get the columns {hidden}: these names mean something else to it'
        for name, hidden in (("names", "prompts, completions, self"), ("factor", "prompts, completions, self, by"))
    ]


def test_a_missing_column_is_named_with_those_that_are_there(case: Case) -> None:
    for table, name in (("same", "same"), ({"name": "constant"}, "constant")):
        with pytest.raises(RecipeError) as caught:
            case.score(table, question=["a", "b"], answers=["a", "b"])
        assert f'reward "{name}" reads the column "answer", which the rows have not (did you mean "answers"?)' in (
            caught.value.what
        )
        assert "their columns are question, answers" in caught.value.why and caught.value.exit_code == 2
    case.make({"name": "constant", "column": "x"}).check_columns(["x"])


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_reward_that_raises_is_counted_and_told_once(case: Case) -> None:
    rewards = case.make({"name": "raises", "max_failures": 1.0}, "words")
    for _ in range(3):
        scored = rewards.score(["p", "p"], ["one", "two words"], {})
        assert scored.each == {"raises": [None, None], "words": [1.0, 2.0]} and scored.total == [1.0, 2.0]
        assert scored.failed == {"raises": 2, "words": 0} and scored.messages == {"raises": "KeyError: 'no such thing'"}
    assert case.said == ["WARNING: reward \"raises\": 2 of 2 values failed: KeyError: 'no such thing'"]
    assert rewards.state()["raises"]["failed"] == 6


def test_one_value_of_a_call_may_fail(case: Case) -> None:
    scored = case.score({"name": "some", "max_failures": 1})
    assert scored.total == [None, 0.5] and scored.failed == {"some": 1}
    assert scored.messages == {"some": "ValueError: not this one"}


def test_a_system_exit_is_a_failure(case: Case) -> None:
    assert case.score({"name": "leaves", "max_failures": 1}).messages == {"leaves": "RuntimeError: SystemExit: bye"}


@pytest.mark.parametrize(("name", "left"), [("hangs", True), ("blocks", True), ("later", False)])
def test_a_reward_that_hangs_is_given_up(case: Case, name: str, left: bool) -> None:
    table = {"name": name, "timeout": 0.2, "max_failures": 1.0, **({"seconds": 30.0} if name == "later" else {})}
    started = time.monotonic()
    scored = case.score(table, "words")
    assert time.monotonic() - started < 3 and scored.total == [1.0, 2.0] and scored.failed[name] == 2
    assert scored.messages[name].endswith(f"no answer within 0.2 s{'; its thread was left behind' if left else ''}")
    assert len(case.said) == 1 and scored.messages[name] in case.said[0]


def test_a_thread_left_behind_does_not_keep_the_process(plugin: Path, tmp_path: Path) -> None:
    code = f"""
    from pathlib import Path
    from alignzoo.plugins import discover
    from alignzoo.recipe import load_recipe
    from alignzoo.rewards import make_rewards
    table = {SMALL!r} | {{"rewards": [{{"name": "hangs", "timeout": 0.2, "max_failures": 1.0}}]}}
    print(make_rewards(load_recipe(table), discover([Path({str(plugin)!r})])).score(["p"], ["c"], {{}}).failed)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=25)
    assert done.stdout.splitlines()[-1] == "{'hangs': 1}", done.stderr


def test_a_users_mistake_is_no_failure(case: Case) -> None:
    with pytest.raises(AlignzooError, match="the data is wrong"):
        case.score({"name": "mistake", "max_failures": 1.0})


def test_above_the_share_the_run_stops(case: Case) -> None:
    """0.1 of 20 calls is two calls; calls not yet made count as good."""
    rewards = case.make("raises")
    for _ in range(2):
        rewards.score(["p"], ["c"], {})
    with pytest.raises(RunError) as caught:
        rewards.score(["p"], ["c"], {})
    assert 'reward "raises" fails too often: 3 of 3 values in its last 3 calls' in caught.value.what
    assert "KeyError: 'no such thing'" in caught.value.why and "max_failures = 0.1" in caught.value.fix
    assert caught.value.exit_code == 1
    with pytest.raises(RunError):
        case.score({"name": "some", "max_failures": 0.0})


def test_the_share_is_that_of_the_last_calls(case: Case) -> None:
    rewards = case.make({"name": "some", "max_failures": 0.1})  # it fails for one of its completions
    for _ in range(3 * WINDOW):
        rewards.score(["p"] * 10, ["c"] * 10, {})
    assert rewards.state()["some"] == {"failed": 3 * WINDOW, "recent": [[10, 1]] * WINDOW}
    with pytest.raises(RunError, match=f"20 of 191 values in its last {WINDOW} calls"):
        for _ in range(2):
            rewards.score(["p"], ["c"], {})


def test_counts_go_on_after_a_resume(case: Case) -> None:
    first = case.make("raises", "words")
    for _ in range(2):
        first.score(["p"], ["c"], {})
    state = json.loads(json.dumps(first.state()))
    second = case.make("raises", "words", "ones")
    second.load_state(state)
    assert second.state() == {**first.state(), "ones": {"failed": 0, "recent": []}}
    case.said.clear()
    with pytest.raises(RunError, match="3 of 3"):
        second.score(["p"], ["c"], {})
    assert case.said == []  # told before


# --- starting ---------------------------------------------------------------------------------------------------------


def test_start_hands_on_the_device_and_the_line(case: Case) -> None:
    rewards = case.make("constant", "words")
    rewards.start("cpu")
    assert case.said == ['reward "constant": on cpu']
    with pytest.raises(PluginError, match='reward "constant" cannot start: OSError: no such device'):
        rewards.start("broken")


def test_a_line_for_each(case: Case) -> None:
    lines = case.make({"name": "constant", "value": 2, "weight": 0.5}, "words").describe()
    version = case.registry.reward("words").version
    constant = f'constant (file {version}), weight 0.5: value = 2.0, column = "answer"'
    assert lines == [constant, f"words (file {version}), weight 1: no settings"]
