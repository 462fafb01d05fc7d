"""One recipe with several losses on a tiny model: what is shared, what a failure does, what is not run again."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from runs_helpers import finished, write_recipe

from alignzoo.cli import cli
from alignzoo.comparing import compare_losses
from alignzoo.errors import AlignzooError, RecipeError
from alignzoo.measures import MEASURES, start_of, sums_of
from alignzoo.readrun import Run, read_finished
from alignzoo.sweep import plan, start_process, sweep

FAILS = "ipo:train.learning_rate=1e30"


def here(words: Sequence[str]) -> tuple[int, str]:
    """A run in this process."""
    done = CliRunner().invoke(cli, list(words))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stderr.rpartition("error: ")[2]


class Compared:
    """dpo, ipo, kto and sft with two seeds; ipo cannot go well."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.said, self.started = folder, list[str](), list[Sequence[str]]()
        self.recipe = write_recipe(folder, model, eval__every_steps=6, samples__from_eval=0)
        self.code = self.again(["dpo", "ipo", "kto", "sft"], of_loss=[FAILS])

    def again(self, losses: Sequence[str], **how: Any) -> int:
        self.said.clear()
        self.started.clear()

        def start(words: Sequence[str]) -> tuple[int, str]:
            self.started.append(words)
            return here(words)

        how = {"seeds": 2, **how}
        return compare_losses(self.recipe, losses, self.folder / "out", None, self.said.append, start=start, **how)

    def run(self, name: str) -> Run:
        return read_finished(self.folder / "out" / name)

    @property
    def table(self) -> Any:
        return json.loads((self.folder / "out/comparison.json").read_text())


@pytest.fixture(scope="module")
def compared(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNZOO_CACHE", str(tmp_path_factory.mktemp("compare-cache")))
        return Compared(tmp_path_factory.mktemp("compared"), tiny_folder)


def test_a_failing_run_is_told_and_the_others_go_on(compared: Compared) -> None:
    assert compared.code == 1 and len(compared.started) == 8
    text = "\n".join(compared.said)
    assert re.search(r"FAILED: ipo-seed42: .*not finite", text) and "FAILED: ipo-seed43" in text, text
    page = (compared.folder / "out/comparison.html").read_text()
    assert re.search(r"ipo-seed42 failed and is not compared: .*not finite", page)
    assert [(g["label"], g["seeds"]) for g in compared.table["groups"]] == [
        ("dpo", [42, 43]), ("kto", [42, 43]), ("sft", [42, 43]),
    ]  # fmt: skip


def test_what_is_the_same_for_all(compared: Compared) -> None:
    """Data, start model, held-out rows, settings but the loss, and the reference: computed once."""
    runs = {name: compared.run(f"{name}-seed{seed}") for name in ("dpo", "kto", "sft") for seed in (42, 43)}
    dpo = runs["dpo"]
    for run in runs.values():
        assert run.manifest["data"] == dpo.manifest["data"] and run.manifest["weights"] == dpo.manifest["weights"]
        assert run.rows is not None and dpo.rows is not None and run.rows.names == dpo.rows.names
        assert {**run.recipe["train"], "seed": 0} == {**dpo.recipe["train"], "seed": 0}
        np.testing.assert_allclose(run.rows.policy[0], dpo.rows.policy[0], atol=1e-3)
    used = {name: compared.run(name).summary.get("reference_cache") for name in ("dpo-seed42", "dpo-seed43")}
    assert (used["dpo-seed42"]["computed"], used["dpo-seed43"]["computed"]) == (used["dpo-seed42"]["completions"], 0)
    kto = compared.run("kto-seed42").summary["reference_cache"]
    assert kto["computed"] == kto["completions"] - used["dpo-seed42"]["completions"]  # mismatched ones
    assert {k for k, _ in json.loads((compared.folder / "out/comparison.json").read_text())["settings"].items()} == {
        "loss.name", "loss.beta", "loss.label_smoothing", "loss.length_normalised", "loss.reference_free",
        "loss.desirable_weight", "loss.undesirable_weight", "loss.baseline",
    }  # fmt: skip


def test_the_measures_are_those_of_the_metrics(compared: Compared) -> None:
    """DPO's rewards are beta times the log-ratios; SFT's pairs are measured by log-probs per token."""
    for name, measure, metric, scale in (
        ("dpo", "accuracy", "eval_rewards/accuracies", 1.0), ("dpo", "margin", "eval_rewards/margins", 0.1),
        ("dpo", "chosen_logp", "eval_mean_logps/chosen", 1.0),
        ("sft", "mean_logp_accuracy", "eval_pairs/accuracies", 1.0),
        ("kto", "accuracy", "eval_pairs/accuracies", 1.0), ("kto", "margin", "eval_pairs/margins", 1.0),
    ):  # fmt: skip
        run = compared.run(f"{name}-seed43")
        assert run.rows is not None
        found = sums_of(run, run.rows.names, start_of(run, [run]))
        logged = {r["step"]: r[metric] for r in run.records if metric in r}
        assert logged.keys() == found.keys() and len(logged) >= 3
        for step, value in logged.items():
            values = next(m for m in MEASURES if m.key == measure).values(found[step])
            assert values is not None and values.mean() * scale == pytest.approx(value, abs=2e-4), (name, metric, step)


def test_finished_runs_are_not_run_again(compared: Compared) -> None:
    before = compared.table
    assert compared.again(["dpo", "kto", "sft"]) == 0
    assert compared.started == [] and "finished before with the same recipe" in compared.said[0]
    after = compared.table
    assert after["groups"] == before["groups"] and after["differences"] == before["differences"]
    with pytest.raises(RecipeError, match="--loss-set"):
        compared.again(["dpo", "sft"], of_loss=["kto:train.seed=1"])
    with pytest.raises(
        AlignzooError, match=r"dpo-seed42 was made with other settings: train\.learning_rate: 0\.003 -> 1"
    ):
        compared.again(["dpo", "sft"], overrides=["train.learning_rate=1"])
    assert compared.started == []


def test_an_interrupted_run_goes_on(compared: Compared) -> None:
    run = compared.folder / "out/sft-seed42"
    summary = (run / "summary.json").read_text()
    (run / "summary.json").unlink()  # killed before the closing figures
    assert compared.again(["dpo", "sft"]) == 0
    assert [words[-2:] for words in compared.started] == [["--resume", str(run)]]
    assert json.loads((run / "summary.json").read_text())["eval_loss"] == json.loads(summary)["eval_loss"]


def test_mistakes_are_told_before_the_first_run(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_folder)

    def fails(match: str, losses: Sequence[str], **how: Any) -> None:
        with pytest.raises(AlignzooError, match=match):
            compare_losses(recipe, losses, tmp_path / "out", None, print, start=pytest.fail, **how)

    fails("dppo", ["dpo", "dppo"])
    fails("train.lr", ["dpo", "ipo"], overrides=["train.lr=1"])
    fails("loss.beta", ["dpo", "sft"], overrides=["loss.beta=0.2"])
    fails("not of the form LOSS:KEY=VALUE", ["dpo", "sft"], of_loss=["train.seed=1"])
    fails("one run cannot be compared", ["dpo", "dpo"])
    (tmp_path / "out/ipo-seed42").mkdir(parents=True)
    fails("no run directory, and a run is to be made there", ["dpo", "ipo"])


def test_settings_of_one_loss(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_folder, loss__beta=0.3)
    planned = plan(recipe, ["dpo", "ipo"], 2, of_loss=["ipo:train.learning_rate=0.1", "ipo:loss.tau=0.2"])
    assert [(p.loss, p.seed, p.recipe.train.seed, p.recipe.train.learning_rate) for p in planned] == [
        ("dpo", 42, 42, 0.003), ("dpo", 43, 43, 0.003), ("ipo", 42, 42, 0.1), ("ipo", 43, 43, 0.1),
    ]  # fmt: skip
    assert planned[0].recipe.losses[0].settings == {"beta": 0.3}
    assert str(planned[2].recipe.losses[0].settings["tau"]) == "0.2" and len(planned[2].recipe.losses[0].settings) == 1
    assert planned[0].run_dir.path == tmp_path / "runs/compare-tiny/dpo-seed42"


def test_a_signal_ends_the_comparison(tmp_path: Path, tiny_folder: Path) -> None:
    planned = plan(write_recipe(tmp_path, tiny_folder), ["dpo", "ipo"], 1)
    with pytest.raises(AlignzooError, match="the same command again") as found:
        sweep(planned, print, lambda words: (130, ""))
    assert found.value.exit_code == 130


def test_the_error_of_a_process_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    code, error = start_process(["run", "nothing.toml"])
    assert code == 2 and error.startswith("nothing.toml: no such recipe")
    assert "nothing.toml: no such recipe" in capfd.readouterr().err


def test_each_run_is_a_process_of_its_own(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_folder, train__max_steps=1)
    out, _ = finished(
        tmp_path / "log", "compare", "--recipe", recipe, "--losses", "dpo, orpo", "--output", tmp_path / "out"
    )
    assert "run 2 of 2: orpo, seed 42" in out and "Highest accuracy" in out
    assert (tmp_path / "out/comparison.html").exists() and (tmp_path / "out/orpo-seed42/report.html").exists()
