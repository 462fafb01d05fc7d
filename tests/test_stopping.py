"""When a run ends early: a signal, patience, a KL that is too large; and which of its models was the best."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from alignzoo.errors import RecipeError
from alignzoo.ranks import ERRORS, FAILED
from alignzoo.recipe import load_recipe
from alignzoo.stopping import Best, Interrupted, Signals, Stopping

# --- signals ---------------------------------------------------------------------------------------------------------

FIRST = "{}: stopping after this step, with a checkpoint; once more: at once"
START = """
import os, signal, sys, time
from signal import SIGINT, SIGTERM
from alignzoo.stopping import Signals
say = lambda line: print(line, flush=True)
signal.signal(SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would its children
"""


def command(code: str) -> list[str]:
    return [sys.executable, "-c", START + textwrap.dedent(code)]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE", ERRORS}}
    return subprocess.run(command(code), env=kept | environment, capture_output=True, text=True, timeout=60)


def test_the_first_signal_is_noted_and_a_later_one_ends(tmp_path: Path) -> None:
    """As a scheduler sends them, from another process."""
    code = """
        with Signals(say) as signals:
            say(f"ready {signals.asked}")
            while not signals.asked:
                time.sleep(0.02)
            say(f"saving {signals.asked}")
            time.sleep(100)
        """
    with subprocess.Popen(command(code), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready 0\n"
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == FIRST.format("SIGTERM") + "\n"
            assert process.stdout.readline() == "saving 15\n"
            time.sleep(1.1)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            rest = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, rest) == (143, ("", "")) and time.monotonic() - began < 10


@pytest.mark.parametrize(("name", "code", "last_words"), [("SIGTERM", 143, ""), ("SIGINT", -2, "KeyboardInterrupt\n")])
def test_a_signal_that_comes_twice_at_a_time_is_one(name: str, code: int, last_words: str) -> None:
    done = python(
        f"""
        with Signals(say) as signals:
            try:
                signal.raise_signal({name})
                signal.raise_signal({name})
                signal.raise_signal(SIGTERM)  # the other one too
                say(f"still there {{signals.asked == {name}}}")
                time.sleep(1.1)
                signal.raise_signal({name})
                say("not reached")
            finally:
                say("tidied up")
        """
    )
    assert done.stdout.splitlines() == [FIRST.format(name), "still there True", "tidied up"]
    assert done.returncode == code and done.stderr.endswith(last_words) and bool(done.stderr) == bool(last_words)


def test_the_second_signal_acts_as_it_did_before() -> None:
    done = python(
        """
        signal.signal(SIGTERM, lambda number, frame: say(f"as before: {number}"))
        with Signals(say) as signals:
            signal.raise_signal(SIGINT)
            time.sleep(1.1)
            signal.raise_signal(SIGTERM)
            signal.raise_signal(SIGTERM)  # at once, and not as the first of a new pair
        """
    )
    assert done.stdout.splitlines() == [FIRST.format("SIGINT"), "as before: 15", "as before: 15"]
    assert (done.returncode, done.stderr) == (0, "")


def test_a_third_signal_does_not_wait_for_the_tidying_up() -> None:
    done = python(
        """
        with Signals(say):
            try:
                signal.raise_signal(SIGTERM)
                time.sleep(1.1)
                signal.raise_signal(SIGTERM)
            finally:
                say("tidying up")
                signal.raise_signal(SIGTERM)
        """
    )
    assert done.stdout.splitlines() == [FIRST.format("SIGTERM"), "tidying up"] and done.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("failed", "said", "code"), [(True, [], 143), (False, [FIRST.format("SIGTERM"), "goes on"], 0)]
)
def test_where_another_rank_is_gone_the_first_signal_ends(
    failed: bool, said: list[str], code: int, tmp_path: Path
) -> None:
    if failed:
        (tmp_path / FAILED).touch()
    lines = 'with Signals(say):\n    signal.raise_signal(SIGTERM)\n    say("goes on")'
    done = python(lines, **{ERRORS: str(tmp_path), "RANK": "0", "WORLD_SIZE": "2"})
    assert (done.stdout.splitlines(), done.returncode, done.stderr) == (said, code, "")


def test_handlers_are_as_they_were_afterwards() -> None:
    def handlers() -> list[Any]:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    before = handlers()
    with pytest.raises(KeyError), Signals(print):
        assert not set(map(id, handlers())) & set(map(id, before))
        raise KeyError
    assert handlers() == before
    inside: list[list[Any]] = []

    def in_a_thread() -> None:
        with Signals(print) as signals:
            inside.append([*handlers(), signals.asked])

    thread = threading.Thread(target=in_a_thread)  # where Python cannot set them
    thread.start()
    thread.join()
    assert inside == [[*before, 0]]


def test_the_exit_code_of_an_interrupted_run_is_a_shells() -> None:
    error = Interrupted(signal.SIGTERM, "stopped after step 3", fix="go on")
    assert error.exit_code == 143 and str(error) == "stopped after step 3\n  way out: go on"
    assert Interrupted(signal.SIGINT, "").exit_code == 130 and Signals.name(15) == "SIGTERM"


# --- the best evaluation, and when to stop ---------------------------------------------------------------------------


def stopping(state: dict[str, Any] | None = None, **settings: Any) -> Stopping:
    recipe = {
        "loss": {"name": "dpo"},
        "model": {"path": "a/model"},
        "data": {"train": "rows.jsonl", "eval": "held-out.jsonl"},
        "train": {"learning_rate": 1e-5},
        "eval": {"every_steps": 1, **settings},
    }
    return Stopping(load_recipe(recipe), state)


def looked(judge: Stopping, name: str, values: Sequence[float], first: int = 1) -> list[int]:
    """The steps whose evaluation was the best so far."""
    return [step for step, value in enumerate(values, first) if judge.look({"step": step, name: value})]


@pytest.mark.parametrize(
    ("name", "best", "values", "steps", "value"),
    [
        ("eval_loss", "auto", [0.5, 0.4, 0.6, 0.4, 0.3], [1, 2, 5], 0.3),
        ("eval_nll_loss", "auto", [2.0, 1.0, 3.0], [1, 2], 1.0),
        ("eval_rewards/ties", "auto", [0.5, 0.25, 0.5], [1, 2], 0.25),
        ("eval_rewards/accuracies", "auto", [0.5, 0.4, 0.6, 0.6, 0.7], [1, 3, 5], 0.7),
        ("eval_rewards/margins", "auto", [-3.0, -1.0, -2.0, 0.0], [1, 2, 4], 0.0),
        ("eval_loss", "highest", [0.5, 0.4, 0.6], [1, 3], 0.6),
        ("eval_loss", "lowest", [0.5, 0.4, 0.6], [1, 2], 0.4),
        ("eval_rewards/accuracies", "lowest", [0.5, 0.4, 0.6], [1, 2], 0.4),
        ("eval_loss", "auto", [0.0, -1.0, 0.0], [1, 2], -1.0),
    ],
)
def test_the_best_evaluation(name: str, best: str, values: list[float], steps: list[int], value: float) -> None:
    judge = stopping(best_metric=name, best=best)
    assert looked(judge, name, values) == steps
    since = len(values) - steps[-1]
    assert judge.state == {"metric": name, "value": value, "step": steps[-1], "since": since}
    assert judge.reason({"step": len(values)}) == ""  # no patience, no limit


def test_steps_without_an_evaluation_count_for_nothing() -> None:
    judge = stopping(best_metric="eval_loss", patience=1, max_kl=1.0)
    assert not judge.look({}) and judge.reason({}) == "" and judge.best == Best(judge.settings.best_metric)
    assert looked(judge, "eval_loss", [0.5]) == [1]
    assert not judge.look({}) and judge.reason({}) == "" and judge.state["since"] == 0


def test_without_a_metric_nothing_is_best() -> None:
    judge = stopping()
    assert looked(judge, "eval_loss", [3.0, 2.0]) == [] and judge.reason({"step": 2, "eval_kl/chosen": 99.0}) == ""
    assert judge.best == Best(judge.settings.best_metric)


def test_patience() -> None:
    judge = stopping(best_metric="eval_loss", patience=2)
    reasons = []
    for step, value in enumerate([0.5, 0.25, 0.375, 0.125, 0.125, 0.1875], 10):
        judge.look({"step": step, "eval_loss": value})
        reasons.append(judge.reason({"step": step, "eval_loss": value}))
    assert reasons[:5] == [""] * 5
    assert reasons[5] == "eval_loss was best at step 13 (0.125), and 2 evaluations did not better it (eval.patience)"


def test_a_kl_that_is_too_large() -> None:
    judge = stopping(max_kl=2.5)
    for near in (0.0, 2.5, -2.5):
        assert judge.reason({"step": 1, "eval_kl/chosen": near, "eval_kl/rejected": 99.0}) == ""
    for far in (2.625, -2.625):
        said = "|eval_kl/chosen| is 2.625, more than eval.max_kl = 2.5"
        assert judge.reason({"step": 1, "eval_kl/chosen": far, "eval_kl/rejected": 0.0}) == said
    other = stopping(max_kl=2.5, max_kl_metric="kl/rejected")
    said = "|eval_kl/rejected| is 99, more than eval.max_kl = 2.5"
    assert other.reason({"step": 1, "eval_kl/chosen": 0.0, "eval_kl/rejected": 99.0}) == said
    assert other.reason({}) == ""


def test_a_metric_that_does_not_exist() -> None:
    line = {"step": 1, "eval_rewards/margins": 0.0, "eval_loss": 0.5}
    with pytest.raises(RecipeError) as error:
        stopping(best_metric="eval_los").look(line)
    assert error.value.exit_code == 2
    assert error.value.what.endswith('eval.best_metric: there is no metric "eval_los"')
    assert error.value.fix == "one of eval_loss, eval_rewards/margins, step"
    with pytest.raises(RecipeError) as error:
        stopping(max_kl=1.0, max_kl_metric="kl/all").reason(line)
    assert error.value.what.endswith('eval.max_kl_metric: there is no metric "eval_kl/all"')
    assert error.value.fix == "one of loss, rewards/margins, step"


def test_a_recipe_file_is_named_where_a_metric_does_not_exist(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(
        '[loss]\nname = "dpo"\n[model]\npath = "a/model"\n[data]\ntrain = "rows.jsonl"\neval = "held.jsonl"\n'
        '[train]\nlearning_rate = 1e-5\n[eval]\nevery_steps = 1\nbest_metric = "accuracy"\n'
    )
    with pytest.raises(RecipeError, match=r"r\.toml:12: eval\.best_metric"):
        Stopping(load_recipe(file)).look({"step": 1, "eval_loss": 0.5})


@pytest.mark.parametrize("name", ["eval_loss", "eval_rewards/margins"])
def test_a_resumed_run_judges_as_one_that_was_not_interrupted(name: str) -> None:
    values = [0.5, 0.1 + 0.2, 0.7, 0.4, 0.6, 0.65, 0.1]
    for cut in range(len(values) + 1):
        whole, before = (stopping(best_metric=name, patience=3) for _ in range(2))
        steps = looked(before, name, values[:cut])
        after = stopping(json.loads(json.dumps(before.state)), best_metric=name, patience=3)
        assert looked(whole, name, values) == steps + looked(after, name, values[cut:], cut + 1)
        assert after.state == whole.state and after.reason({}) == whole.reason({})


@pytest.mark.parametrize("name", ["eval_loss", "eval_rewards/margins"])
def test_what_is_no_number_is_never_the_best(name: str) -> None:
    judge = stopping(best_metric=name)
    assert looked(judge, name, [math.nan, 0.5, math.nan, 0.5]) == [2]
    assert judge.state == {"metric": name, "value": 0.5, "step": 2, "since": 2}


def test_a_kl_that_is_no_number_ends_the_run() -> None:
    assert "eval_kl/chosen" in stopping(max_kl=1.0).reason({"step": 1, "eval_kl/chosen": math.nan})
