"""Settings of a loss that follow a schedule or a metric: values, bounds, mistakes, whole runs, resumes, ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from alignzoo_losses.dpo import DPO
from click.testing import CliRunner
from runs_helpers import finished, metrics_of, sets, weights_in, write_recipe

import alignzoo
from alignzoo.adapt import Controller, Schedule, Steering
from alignzoo.check import find_loss
from alignzoo.cli import cli
from alignzoo.errors import RecipeError
from alignzoo.plugins import discover
from alignzoo.recipe import load_recipe
from alignzoo.resume import recipe_changes, table_of
from alignzoo.rundir import RunDir

ADAPT = {"adapt": "kl/chosen", "high": 5, "low": 0.1, "up": 1.2, "down": 0.8}
REST: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "t"}, "train": {"learning_rate": 1.0}}


def recipe_with(loss: str = "dpo", **settings: Any) -> alignzoo.Recipe:
    return load_recipe({"loss": {"name": loss, **settings}, **REST})


def steering(loss: str = "dpo", **settings: Any) -> Steering:
    recipe = recipe_with(loss, **settings)
    return Steering(recipe, find_loss(recipe, discover())[1])


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "values"),
    [("linear", [0.5, 0.4, 0.3, 0.2, 0.1]), ("cosine", [0.5, 0.5 - 0.4 * (1 - math.sqrt(0.5)) / 2, 0.3, None, 0.1])],
)
def test_a_schedule(way: str, values: list[float | None]) -> None:
    found = steering(beta={"schedule": way, "from": 0.5, "to": 0.1})
    for step, value in enumerate(values, start=1):
        beta = found.at(step, 5).settings.beta
        assert value is None or beta == pytest.approx(value)
        assert found.line == {"loss/beta": beta}
    assert found.at(1, 1).settings.beta == 0.5


def test_a_controller() -> None:
    """Above the band, below it, within it, without the metric."""
    found = steering(beta=ADAPT)
    assert found.loss.settings.beta == 0.1  # the setting's default
    betas = []
    for step, kl in enumerate([9.0, 5.1, 5.0, 3.0, 0.1, 0.09, None], start=1):
        betas.append(found.at(step, 9).settings.beta)
        found.see({"step": step, "loss": 1.0, **({} if kl is None else {"kl/chosen": kl})})
    betas.append(found.at(9, 9).settings.beta)
    high = 0.1 * 1.2 * 1.2
    assert betas == pytest.approx([0.1, 0.12, high, high, high, high, high * 0.8, high * 0.8])


def test_an_evaluation_can_be_followed() -> None:
    found = steering(beta={**ADAPT, "adapt": "eval_kl/chosen", "start": 0.3})
    found.see({"step": 1, "eval_kl/chosen": 9.0, "eval_loss": 1.0})
    found.see({"step": 1, "loss": 1.0, "kl/chosen": 0.0})
    assert found.at(2, 9).settings.beta == pytest.approx(0.36)


def test_bounds() -> None:
    """Its own min and max, then those of the setting: here label_smoothing < 0.5."""
    found = steering(beta={**ADAPT, "min": 0.09, "max": 0.11})
    for kl, value in ((9.0, 0.11), (0.0, 0.09)):
        for _ in range(3):
            found.see({"loss": 1.0, "kl/chosen": kl})
        assert found.at(2, 9).settings.beta == value
    found = steering(label_smoothing={**ADAPT, "start": 0.3, "up": 1.5})
    for _ in range(3):
        found.see({"loss": 1.0, "kl/chosen": 9.0})
    assert found.at(2, 9).settings.label_smoothing == pytest.approx(0.45)


def test_the_state_goes_on() -> None:
    one, other = steering(beta=ADAPT), steering(beta=ADAPT)
    one.see({"loss": 1.0, "kl/chosen": 9.0})
    other.load_state(json.loads(json.dumps(one.state)))
    assert other.at(5, 9).settings.beta == one.at(5, 9).settings.beta == pytest.approx(0.12)


def test_without_one_the_loss_is_the_same_object() -> None:
    found = Steering(recipe_with(), loss := DPO())
    assert found.at(3, 9) is loss and found.line == {}


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "name", "table", "words"),
    [
        ("dpo", "length_normalised", ADAPT, "only a setting that is a number can move"),
        ("dpo", "betta", ADAPT, 'unknown key "betta" (did you mean "beta"?)'),
        ("dpo", "beta", {"adapt": "kl/chosen", "high": 5}, '"low" is missing'),
        ("dpo", "beta", {**ADAPT, "hig": 5}, 'unknown key "hig" (did you mean "high"?)'),
        ("dpo", "beta", {**ADAPT, "low": 5}, "low = 5 is not below high = 5"),
        ("dpo", "beta", {**ADAPT, "up": 0}, "up = 0 is out of range"),
        ("dpo", "beta", {**ADAPT, "start": 0.0}, "it begins with 0"),
        ("dpo", "label_smoothing", ADAPT, "it begins with 0"),
        ("dpo", "beta", {**ADAPT, "min": 0.2}, "it begins with 0.1, which is not between min and max"),
        ("dpo", "beta", {**ADAPT, "adapt": "tokens_per_second"}, "depends on the machine"),
        ("dpo", "beta", {"schedule": "linear", "from": 0.5}, '"to" is missing'),
        ("dpo", "beta", {"schedule": "linear", "to": 0.5}, '"from" is missing'),
        ("dpo", "beta", {"schedule": "step", "from": 0.5, "to": 0.1}, 'schedule = "step": is not among the choices'),
        ("dpo", "beta", {"schedule": "linear", "from": 0.5, "to": 0.0}, "beta = 0 is where it may go"),
        ("dpo", "label_smoothing", {**ADAPT, "start": 0.1, "max": 0.7}, "label_smoothing = 0.7 is where it may go"),
        ("grpo", "beta", {"schedule": "linear", "from": 0.1, "to": 0.0}, "True at first and False with beta = 0"),
        ("dpo", "beta", {"schedule": "linear", "from": "a", "to": 0.1}, "from = \"a\""),
    ],
)  # fmt: skip
def test_a_mistake_has_a_place(loss: str, name: str, table: dict[str, Any], words: str, tmp_path: Path) -> None:
    inline = ", ".join(f"{k} = {json.dumps(v)}" for k, v in table.items())
    file = tmp_path / "r.toml"
    file.write_text(
        f'[loss]\nname = "{loss}"\n{name} = {{{inline}}}\n[model]\npath = "m"\n[data]\ntrain = "t"\n'
        "[train]\nlearning_rate = 1.0\n"
    )
    with pytest.raises(RecipeError) as caught:
        find_loss(load_recipe(file), discover())
    assert words in str(caught.value) and "r.toml:3" in str(caught.value)


def test_an_unknown_metric_is_told_at_the_first_record() -> None:
    found = steering(beta={**ADAPT, "adapt": "kl/choosen"})
    found.see({"step": 0, "eval_loss": 1.0, "eval_kl/chosen": 0.0})
    with pytest.raises(RecipeError, match=r'follows "kl/choosen".*no such metric') as caught:
        found.see({"step": 1, "loss": 1.0, "kl/chosen": 0.0})
    assert "kl/chosen" in caught.value.fix


def test_a_record_of_one_label_only_is_no_mistake() -> None:
    found = steering("kto", beta=ADAPT)
    found.see({"step": 1, "loss": 1.0, "kl/rejected": 0.0})
    assert found.at(2, 9).settings.beta == 0.1


def test_a_loss_may_not_log_there() -> None:
    from alignzoo.metrics import RESERVED_PREFIXES

    assert "loss/beta".startswith(RESERVED_PREFIXES)


# --- runs ------------------------------------------------------------------------------------------------------------

TABLE = 'adapt = "kl/chosen", high = 1.0, low = 0.1, up = 1.5, down = 0.5'


def betas(run_dir: Path) -> list[float]:
    return [line["loss/beta"] for line in metrics_of(run_dir) if "loss" in line]


def replayed(run_dir: Path, start: float) -> list[float]:
    """What the records say the betas must have been."""
    value, found = start, []
    for line in (line for line in metrics_of(run_dir) if "loss" in line):
        found.append(value)
        value *= 1.5 if line["kl/chosen"] > 1.0 else 0.5 if line["kl/chosen"] < 0.1 else 1.0
    return found


def test_a_run_and_its_resume(tiny_folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "loss__beta": {"adapt": "kl/chosen", "high": 1.0, "low": 0.1, "up": 1.5, "down": 0.5, "start": 0.2},
        "loss__label_smoothing": {"schedule": "linear", "from": 0.0, "to": 0.22}, "train__learning_rate": 0.01,
        "checkpoint__every_steps": 5, "samples__from_eval": 0, "samples__prompts": [],
    }  # fmt: skip
    whole = alignzoo.run(write_recipe(tmp_path / "a", tiny_folder, "whole", **changes)).run_dir
    assert betas(whole) == pytest.approx(replayed(whole, 0.2))
    assert len(set(betas(whole))) > 2
    smoothing = [line["loss/label_smoothing"] for line in metrics_of(whole) if "loss" in line]
    assert smoothing == pytest.approx([0.02 * s for s in range(12)])
    table = table_of(RunDir(whole))
    assert table["loss"]["beta"] == changes["loss__beta"]
    assert table["loss"]["label_smoothing"] == changes["loss__label_smoothing"]

    recipe = write_recipe(tmp_path / "a", tiny_folder, "halved", **changes)
    halved = alignzoo.run(recipe).run_dir
    (halved / "summary.json").unlink()
    again = alignzoo.run(recipe, resume=halved).run_dir
    assert metrics_of(again) == metrics_of(whole)
    ours, theirs = weights_in(again / "model"), weights_in(whole / "model")
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_what_moves_changes_what_is_learned(tiny_folder: Path, tmp_path: Path) -> None:
    run = alignzoo.run(
        write_recipe(tmp_path / "a", tiny_folder, loss__beta={"schedule": "linear", "from": 0.1, "to": 0.4})
    ).run_dir
    lines = [line for line in metrics_of(run) if "loss" in line]
    assert lines[-1]["loss/beta"] == pytest.approx(0.4)
    for line in lines[1:]:
        assert line["rewards/chosen"] == pytest.approx(line["loss/beta"] * line["kl/chosen"], rel=1e-4)


def test_two_ranks_move_alike(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "a", tiny_folder, samples__prompts=[], samples__from_eval=0)
    words = [f"loss.beta={{{TABLE}}}", "train.max_steps=6"]
    runs = []
    for name, more in (("one", []), ("two", ["--processes", "2"])):
        sets_ = [w for word in (*words, f"log.run_name={name}") for w in ("--set", word)]
        finished(tmp_path / name, "run", recipe, *more, *sets_)
        runs.append(tmp_path / "a/runs" / name)
    assert betas(runs[0]) == betas(runs[1]) == pytest.approx(replayed(runs[1], 0.1))
    assert len(set(betas(runs[1]))) > 1


def test_check_says_what_moves(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "a", tiny_folder)
    words = ["check", str(recipe), *sets(loss__beta=f"{{{TABLE}}}")]
    done = CliRunner().invoke(cli, words, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "loss.beta moves: from 0.1, times 1.5 where kl/chosen is above 1, 0.5 below 0.1" in done.output


def test_a_schedule_depends_on_the_number_of_steps() -> None:
    def table(moving: Any, steps: int) -> dict[str, Any]:
        train = {"epochs": 1, "max_steps": steps, "lr_scheduler": "constant"}
        return {"loss": {"name": "dpo", "beta": moving}, "train": train}

    assert len(recipe_changes(table(ADAPT, 5), table(ADAPT, 6))) == 1
    moving = {"schedule": "linear", "from": 0.5, "to": 0.1}
    with pytest.raises(RecipeError, match="max_steps"):
        recipe_changes(table(moving, 5), table(moving, 6))


def test_in_words() -> None:
    assert str(Schedule("linear", 0.5, 0.1)) == "from 0.5 to 0.1 over all steps, linear"
    assert str(Controller("kl", 5, 1)) == "times 1.2 where kl is above 5, 0.8 below 1"
