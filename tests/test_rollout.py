"""Online runs: prompts answered by the policy, rewarded, and learned from; by one process and by several, resumed."""

from __future__ import annotations

import io
import json
import random
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from runs_helpers import (
    after_lines,
    assert_the_same_run,
    distance,
    end_early,
    finished,
    kill_all,
    lines_of,
    metrics_of,
    send,
    write_recipe,
)

import alignzoo
from alignzoo.errors import AlignzooError, DataError, RecipeError, RunError

PLUGIN = '''"""A reward: the share of a letter in the answer, and one that fails on purpose."""
import time
from alignzoo import hookimpl

def letter(prompts, completions, *, wanted: str = "e", **columns):
    return [text.count(wanted) / max(len(text), 1) for text in completions]

def none_of_them(prompts, completions, **columns):
    return [None] * len(completions)

def broken(prompts, completions, **columns):
    raise RuntimeError("the server is gone")

def too_few(prompts, completions, **columns):
    return [1.0]

def hanging(prompts, completions, **columns):
    time.sleep(60)

@hookimpl
def alignzoo_rewards():
    return [letter, none_of_them, broken, too_few, hanging]
'''
LETTER = '[[rewards]]\nname = "letter"\n'
OF_THE_MACHINE = ("seconds_sampling", "seconds_rewards")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def online(folder: Path, model: Path, name: str = "online", rewards: str = LETTER, **changes: Any) -> Path:
    """A recipe that samples 4 completions of up to 6 tokens for each prompt, and its plugin beside it."""
    defaults = {
        "loss__name": "grpo", "rollout__completions": 4, "rollout__max_new_tokens": 6, "train__max_steps": 6,
        "train__epochs": 1, "eval__every_steps": 4, "samples__from_eval": 0, "samples__max_new_tokens": 2,
    }  # fmt: skip
    file = write_recipe(folder, model, name, **{**defaults, **changes})
    file.write_text(f"{file.read_text()}\n{rewards}")
    (folder / "plugin.py").write_text(PLUGIN)
    return file


def run(file: Path) -> alignzoo.Result:
    return alignzoo.run(file, plugins=[file.parent / "plugin.py"], console=Console(file=io.StringIO(), width=200))


def completions_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()]


def without_clock(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if not k.endswith(OF_THE_MACHINE)} for record in records]


# --- every loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["grpo", "dpo", "kto", "sft"])
def test_every_loss_learns_from_its_own_answers(loss: str, tiny_folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"rollout__threshold": 0.04} if loss == "kto" else {}
    found = run(online(tmp_path, tiny_folder, loss__name=loss, **changes))
    records = metrics_of(found.run_dir)
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    for record in steps:
        assert 1 <= record["rollout/length_min"] <= record["rollout/length"] <= record["rollout/length_max"] <= 6
        assert 0 <= record["rollout/reward"] <= 1
        assert record["rollout/reward"] == record["rollout/rewards/letter"]
    assert [r["step"] for r in records if "eval_rollout/reward" in r] == [0, 4, 6]
    lines = completions_of(found.run_dir)
    assert {line["step"] for line in lines if not line["held_out"]} == {1, 2, 3, 4, 5, 6}
    for line in lines:
        text = line["completion"]
        assert line["reward"] == line["rewards"]["letter"] == text.count("e") / max(len(text), 1)
        assert isinstance(line["prompt"], str) and line["prompt"] and "jsonl:" in line["row"]


def test_the_reward_grows(tiny_folder: Path, tmp_path: Path) -> None:
    file = online(
        tmp_path, tiny_folder, train__max_steps=24, train__epochs=8, train__learning_rate=0.02,
        rollout__completions=8, train__lr_scheduler="constant", eval__every_steps=24,
    )  # fmt: skip
    records = metrics_of(run(file).run_dir)
    before, after = (r["eval_rollout/reward"] for r in records if "eval_rollout/reward" in r)
    assert after > 3 * before + 0.1, (before, after)


def test_nothing_to_learn_from_is_an_empty_step(tiny_folder: Path, tmp_path: Path) -> None:
    file = online(tmp_path, tiny_folder, loss__name="dpo", rollout__min_gap=2.0)
    records = metrics_of(run(file).run_dir)
    steps = [r for r in records if "learning_rate" in r]
    assert len(steps) == 6 and all(r["rollout/empty_steps"] == 1 and "loss" not in r for r in steps)
    assert all(r["rollout/rows_per_prompt"] == 0 for r in steps)


# --- the machine does not matter -------------------------------------------------------------------------------------

REUSED = {"rollout__refresh_every_steps": 2, "rollout__iterations": 2}


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What one process makes of three recipes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for name, changes in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        found[name] = run(online(folder, tiny_folder, name, **changes)).run_dir
    torch.set_num_threads(before)
    return found


CASES: Mapping[str, dict[str, Any]] = {
    "grpo": {"loss__beta": 0.04},
    "reused": {**REUSED, "loss__beta": 0.0},
    "pairs": {"loss__name": "dpo", "rollout__pairs_per_prompt": 2},
}


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(("name", "zero"), [("grpo", 0), ("grpo", 3), ("reused", 2), ("pairs", 3)])
def test_two_ranks_sample_and_learn_what_one_does(
    name: str, zero: int, alone: dict[str, Path], tiny_folder: Path, tmp_path: Path
) -> None:
    file = online(tmp_path, tiny_folder, name, **CASES[name], engine__zero=zero)
    finished(tmp_path / "log", "run", file, "--plugin", tmp_path / "plugin.py", "--processes", "2")
    ours, theirs = tmp_path / "runs" / name, alone[name]
    for mine, other in zip(completions_of(ours), completions_of(theirs), strict=True):
        assert mine | {"row": ""} == other | {"row": ""}
    for mine, other in zip(without_clock(metrics_of(ours)), without_clock(metrics_of(theirs)), strict=True):
        assert mine.keys() == other.keys()
        for key in mine.keys() - {"padding_fraction"}:
            assert mine[key] == pytest.approx(other[key], rel=1e-4, abs=1e-4), (mine["step"], key)
    assert distance(ours / "model", theirs / "model", tiny_folder) < 2e-3


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("name", ["grpo", "reused"])
def test_killed_and_resumed_it_is_the_same_run(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    straight, other = tmp_path / "straight", tmp_path / "killed"
    files = [online(f, tiny_folder, name, **CASES[name], checkpoint__every_steps=1) for f in (straight, other)]
    run(files[0])
    words = ["run", files[1], "--plugin", other / "plugin.py"]
    run_dir, rng = other / "runs" / name, random.Random(name)
    for _ in range(2):
        at = min(lines_of(run_dir) + rng.randint(2, 3), 7)
        how = rng.choice([kill_all, send(signal.SIGTERM)])
        resume = ["--resume", run_dir] if run_dir.exists() else []
        end_early(tmp_path / f"end-{at}", run_dir, [*words, *resume], after_lines(at), how)
    finished(tmp_path / "end", *words, "--resume", run_dir)
    found, wanted = completions_of(run_dir), completions_of(straight / "runs" / name)
    assert [c | {"row": ""} for c in found] == [c | {"row": ""} for c in wanted]
    for folder in (run_dir, straight / "runs" / name):  # compared above; names of files and seconds differ
        (folder / "completions.jsonl").write_text("")
        lines = [json.dumps(line) for line in without_clock(metrics_of(folder))]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert_the_same_run(run_dir, straight / "runs" / name)


# --- rewards that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "error", "words"),
    [
        ('[[rewards]]\nname = "broken"\nmax_failures = 0.01\n', RunError, "the server is gone"),
        ('[[rewards]]\nname = "too_few"\n', AlignzooError, "1 values for 24 completions"),
        ('[[rewards]]\nname = "hanging"\ntimeout = 0.2\nmax_failures = 0.01\n', RunError, "no answer within 0.2 s"),
        ('[[rewards]]\nname = "leter"\n', RecipeError, 'did you mean "letter"'),
        ("", RecipeError, r"\[\[rewards\]\]"),
    ],
)
def test_rewards_that_fail_stop_the_run_in_words(
    rewards: str, error: type[Exception], words: str, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        run(online(tmp_path, tiny_folder, rewards=rewards))


def test_failures_that_are_allowed_are_counted(tiny_folder: Path, tmp_path: Path) -> None:
    rewards = LETTER + '[[rewards]]\nname = "broken"\nmax_failures = 1.0\n'
    records = metrics_of(run(online(tmp_path, tiny_folder, rewards=rewards)).run_dir)
    steps = [r for r in records if "loss" in r]
    assert all(r["rollout/rewards_failed/broken"] == 1 for r in steps)
    assert all(r["rollout/reward"] == r["rollout/rewards/letter"] for r in steps)


def test_a_group_loss_without_rollouts_is_told_what_is_missing(tiny_folder: Path, tmp_path: Path) -> None:
    file = write_recipe(tmp_path, tiny_folder, loss__name="grpo")
    with pytest.raises(DataError, match=r"(?s)the loss wants groups.*\[rollout\] and \[\[rewards\]\]"):
        alignzoo.run(file, console=Console(file=io.StringIO()))
