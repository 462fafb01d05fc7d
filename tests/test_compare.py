"""Finished runs beside each other: measures, intervals, pairing by content, and what is said of runs that differ."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from compare_helpers import made_pairs, scores_of, write_run
from conftest import make_trees

from alignzoo.cli import cli
from alignzoo.compare import compare
from alignzoo.comparepage import as_csv, as_json, html, results, verdict
from alignzoo.compareplot import curves
from alignzoo.errors import AlignzooError
from alignzoo.evalrows import read_eval_rows, row_name, write_eval_rows
from alignzoo.measures import MEASURES, Sums
from alignzoo.readrun import read_finished
from alignzoo.resampling import bootstrap, over_seeds, t_quantile

# --- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("df", "p", "value"),  # scipy.stats.t.ppf
    [
        (1, 0.975, 12.706204736174707), (2, 0.975, 4.302652729749464), (3, 0.975, 3.1824463052837078),
        (4, 0.975, 2.7764451051977934), (9, 0.975, 2.2621571627982053), (30, 0.975, 2.0422724563012378),
        (5, 0.9, 1.4758840488244815), (6, 0.995, 3.707428021324907), (2, 0.5, 0.0),
    ],
)  # fmt: skip
def test_quantiles_of_students_t(df: int, p: float, value: float) -> None:
    assert t_quantile(p, df) == pytest.approx(value, rel=1e-9, abs=1e-9)


def test_the_interval_over_seeds() -> None:
    """By hand: the mean of 1, 2, 3, 6 is 3, its standard error sqrt(14/3)/2, and t of 3 degrees 3.1824."""
    found = over_seeds([1.0, 2.0, 3.0, 6.0])
    assert found.mean == 3 and found.high == pytest.approx(3 + 3.1824463052837078 * (14 / 3) ** 0.5 / 2)
    assert found.low == pytest.approx(6 - found.high)
    alone = over_seeds([0.4])
    assert (alone.mean, alone.low, alone.high) == (0.4, None, None) and not alone.clear


def test_the_bootstrap_is_that_of_plain_numpy() -> None:
    rows = np.random.default_rng(3).normal(0.2, 1.0, 60)
    found, generator = bootstrap(rows, resamples=2000, seed=7), np.random.default_rng(7)
    means = [rows[generator.integers(60, size=60)].mean() for _ in range(2000)]
    assert (found.mean, found.low, found.high) == pytest.approx((rows.mean(), *np.quantile(means, (0.025, 0.975))))
    assert found == bootstrap(rows, resamples=2000, seed=7)


def test_the_bootstrap_of_many_rows_is_as_wide_as_theory_says() -> None:
    """The standard error of a mean; drawn in several pieces, as so many rows are."""
    rows = np.random.default_rng(5).exponential(2.0, 3000)
    found = bootstrap(rows)
    error = rows.std(ddof=1) / 3000**0.5
    assert found.high is not None and found.low is not None
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.03)


def test_the_interval_of_differences_holds_the_true_one_as_often_as_it_says() -> None:
    """400 times two models on the same 80 rows, whose difficulty both share: 95 % of intervals hold the difference."""
    generator, held = np.random.default_rng(11), 0
    for _ in range(400):
        difficulty = generator.normal(0, 5, 80)
        one, two = (difficulty + generator.normal(shift, 1, 80) for shift in (0.0, 0.3))
        found = bootstrap(two - one, resamples=1000)
        assert found.low is not None and found.high is not None and found.high - found.low < 1.2  # not of 5's noise
        held += found.low <= 0.3 <= found.high
    assert 0.92 <= held / 400 <= 0.98


# --- measures --------------------------------------------------------------------------------------------------------


def test_measures_by_hand() -> None:
    """Two pairs of 4 and 2 tokens: the first prefers chosen by its log-ratio and rejected by its log-prob."""
    policy, start = np.array([[-12.0, -8.0], [-6.0, -5.0]]), np.array([[-16.0, -9.0], [-6.0, -5.0]])
    tokens = np.array([[4.0, 2.0], [4.0, 2.0]])
    found = {m.key: m.values(Sums(policy, tokens, start)) for m in MEASURES}
    expected: dict[str, list[float]] = {
        "accuracy": [1.0, 0.5], "margin": [3.0, 0.0], "mean_logp_accuracy": [1.0, 1.0], "logp_accuracy": [0.0, 0.0],
        "chosen_shift": [1.0, 0.0], "rejected_shift": [0.5, 0.0], "chosen_logp": [-3.0, -1.5],
    }  # fmt: skip
    assert {key: list(value) for key, value in found.items() if value is not None} == expected
    alone = {m.key: m.values(Sums(policy[:, :1], tokens[:, :1], None)) for m in MEASURES}
    assert [key for key, value in alone.items() if value is not None] == ["chosen_logp"]


def test_rows_are_written_read_and_named_by_content(tmp_path: Path) -> None:
    trees, sums = made_pairs(5, 1.0)
    for step in (0, 4):
        write_eval_rows(tmp_path, step, trees, scores_of(trees, sums[step], sums[0]))
    rows = read_eval_rows(tmp_path)
    assert rows is not None and rows.names == tuple(map(row_name, trees)) and rows.reference is not None
    np.testing.assert_allclose(rows.policy[4], sums[4], atol=5.1e-5)
    np.testing.assert_array_equal(rows.tokens[:, 1], [len(t.completions[1].ids) for t in trees])
    assert len(set(rows.names)) == 5 and row_name(make_trees(5)[2]) == rows.names[2]
    write_eval_rows(tmp_path, 2, trees, scores_of(trees, sums[4]))  # resumed from a checkpoint before step 4
    again = read_eval_rows(tmp_path)
    assert again is not None and sorted(again.policy) == [0, 2]
    (tmp_path / "eval_rows.json").write_text("{")
    with pytest.raises(AlignzooError, match="cannot be read"):
        read_eval_rows(tmp_path)


# --- comparisons -----------------------------------------------------------------------------------------------------


def two_runs(folder: Path, **of_second: Any) -> list[Path]:
    """dpo and ipo on the same 40 rows, ipo with a larger margin."""
    (trees, first), (_, second) = made_pairs(40, 0.5), made_pairs(40, 1.5, seed=1)
    one = write_run(folder / "dpo-seed42", trees, first, loss="dpo")
    two = write_run(folder / "ipo-seed42", trees, second, **{"loss": "ipo", **of_second})
    return [one, two]


def test_differences_are_paired_by_content(tmp_path: Path) -> None:
    """The second run has its rows in another order, and under other numbers."""
    paths = two_runs(tmp_path)
    straight = compare([read_finished(path) for path in paths])
    table = json.loads((paths[1] / "eval_rows.json").read_text())
    turned = {
        "rows": table["rows"][::-1], "reference": None,
        "evaluations": [{"step": e["step"], "policy": e["policy"][::-1]} for e in table["evaluations"]],
    }  # fmt: skip
    (paths[1] / "eval_rows.json").write_text(json.dumps(turned))
    found = compare([read_finished(path) for path in paths])
    assert found.rows == 40 and found.notes == straight.notes == ()
    assert [d.estimate for d in found.differences] == [d.estimate for d in straight.differences]
    margin = next(d for d in found.differences if d.measure.key == "margin")
    shifts = [np.subtract(sums[4], sums[0]) for sums in (made_pairs(40, 0.5)[1], made_pairs(40, 1.5, seed=1)[1])]
    one, two = (shift[:, 0] - shift[:, 1] for shift in shifts)
    by_hand = two - one
    assert margin.estimate.mean == pytest.approx(by_hand.mean(), abs=1e-3) and margin.estimate.clear
    assert margin.estimate.low == pytest.approx(bootstrap(by_hand).low, abs=1e-3)


def test_seeds_are_one_group_and_are_averaged_row_by_row(tmp_path: Path) -> None:
    runs, trees = [], make_trees(40)
    margins: dict[str, list[float]] = {"dpo": [], "ipo": []}
    for loss, lead in (("dpo", 0.5), ("ipo", 1.0)):
        for seed in (44, 42, 43):
            _, sums = made_pairs(40, lead, seed)
            path = write_run(tmp_path / f"{loss}-{seed}", trees, sums, loss=loss, seed=seed)
            runs.append(read_finished(path))
            shift = np.subtract(sums[4], sums[0])
            margins[loss].append(float((shift[:, 0] - shift[:, 1]).mean()))
    found = compare(runs)
    assert [(g.label, g.seeds) for g in found.groups] == [("dpo", [42, 43, 44]), ("ipo", [42, 43, 44])]
    margin = next(m for m in found.measures if m.key == "margin")
    for group in found.groups:
        estimate, values = group.estimate(margin), margins[group.label]
        half = 4.302652729749464 * statistics.stdev(values) / 3**0.5
        assert (estimate.mean, estimate.high) == pytest.approx(
            (statistics.fmean(values), statistics.fmean(values) + half), abs=1e-3
        )
    difference = next(d for d in found.differences if d.measure is margin)
    assert difference.estimate.mean == pytest.approx(
        statistics.fmean(margins["ipo"]) - statistics.fmean(margins["dpo"]), abs=1e-3
    )
    accuracy = found.groups[0].estimate(found.measures[0])
    assert accuracy.low is not None and accuracy.high is not None and 0 <= accuracy.low < accuracy.high <= 1
    assert "In brackets: 95 % intervals over seeds" in results(found).caption


def test_one_seed_has_no_interval_over_seeds_and_says_so(tmp_path: Path) -> None:
    found = compare([read_finished(path) for path in two_runs(tmp_path)])
    table = results(found)
    assert "One seed each, so no interval over seeds: dpo, ipo." in table.caption and "Student" not in table.caption
    assert table.rows[0][2] == f"{found.groups[0].rows('accuracy').mean():.3f}"
    assert as_json(found)["groups"][0]["measures"]["accuracy"]["over_seeds"]["low"] is None


def test_the_verdict(tmp_path: Path) -> None:
    (trees, weak), (_, strong) = made_pairs(60, 0.0), made_pairs(60, 4.0)
    paths = [
        write_run(tmp_path / name, trees, sums, loss=name)
        for name, sums in (("dpo", weak), ("ipo", strong), ("kto", weak))
    ]
    found = compare([read_finished(path) for path in paths])
    lines = verdict(found)
    assert "(ipo), over 60 held-out rows" in lines[0]
    assert lines[1].startswith("ipo: +") and lines[1].endswith("higher than dpo.")
    assert lines[2] == "kto: +0.000 (95 % interval 0.000 to 0.000): no difference from dpo is shown."
    assert verdict(compare(found.runs, "ipo"))[1].endswith("lower than ipo.")
    with pytest.raises(AlignzooError, match='no "nine"'):
        compare(found.runs, "nine")


def test_the_start_model_of_a_run_that_did_not_measure_it(tmp_path: Path) -> None:
    """Out of its reference, or of another run with the same weights; not of one with others."""
    trees, sums = made_pairs(40, 1.0)
    last = {4: sums[4]}
    whole = write_run(tmp_path / "whole", trees, sums, loss="dpo")
    by_reference = write_run(tmp_path / "by_reference", trees, last, loss="kto", reference=sums[0])
    by_other = write_run(tmp_path / "by_other", trees, last, loss="orpo")
    elsewhere = write_run(tmp_path / "elsewhere", trees, last, loss="sft", manifest={"weights": {"model": "d" * 64}})
    moved = write_run(
        tmp_path / "moved", trees, last, loss="ipo", reference=sums[0],
        settings={"reference": {"path": "/other"}}, manifest={"weights": {}},
    )  # fmt: skip
    found = compare([read_finished(path) for path in (whole, by_reference, by_other)])
    assert [d.estimate.mean for d in found.differences if d.measure.key == "margin"] == pytest.approx([0, 0], abs=1e-4)
    assert "chosen_shift" in {m.key for m in found.measures} and "chosen_logp" not in {m.key for m in found.measures}
    for other in (elsewhere, moved):
        unknown = compare([read_finished(path) for path in (whole, other)])
        assert {m.key for m in unknown.measures} == {"mean_logp_accuracy", "logp_accuracy", "chosen_logp"}
        assert any("start model are not known" in note for note in unknown.notes)


def test_what_differs_is_said(tmp_path: Path) -> None:
    other = {
        "data": {"train: t": "x" * 64, "eval: e": "b" * 64},
        "weights": {"m": "y" * 64},
        "versions": {"torch": "3"},
    }
    trees, sums = made_pairs(40, 1.0)
    few = {step: table[:30] for step, table in sums.items()}
    one = write_run(tmp_path / "one", trees, sums)
    two = write_run(tmp_path / "two", trees[:30], few, loss="ipo", manifest=other, summary={"steps": 9})
    found = compare([read_finished(path) for path in (one, two)])
    text = "\n".join(found.notes)
    for words in (
        "the training data is not the same: one | two", "the start model is not the same: one | two",
        "the versions of libraries differ: one | two", "30 are shared by all and compared, of one 40, two 30",
        "4 steps: one; 9 steps: two",
    ):  # fmt: skip
        assert words in text, words
    assert "held-out data" not in text and found.rows == 30
    assert found.differences[0].estimate.mean == pytest.approx(0, abs=1e-3)


def test_other_seeds_are_said(tmp_path: Path) -> None:
    trees, sums = made_pairs(40, 1.0)
    made = [("dpo", 1), ("dpo", 2), ("ipo", 2)]
    runs = [write_run(tmp_path / f"{loss}{seed}", trees, sums, loss=loss, seed=seed) for loss, seed in made]
    found = compare([read_finished(run) for run in runs])
    assert found.notes == ("the seeds are not the same: dpo 1, 2; ipo 2",)
    assert "One seed each, so no interval over seeds: ipo." in results(found).caption


def test_a_sum_of_losses_is_named_by_all_of_them(tmp_path: Path) -> None:
    trees, sums = made_pairs(40, 1.0)
    paths = two_runs(tmp_path)
    file = write_run(tmp_path / "both", trees, sums) / "recipe.toml"
    tables = '[[loss]]\nname = "dpo"\nbeta = 0.1\n[[loss]]\nname = "sft"\nweight = 0.2\n'
    file.write_text(tables + file.read_text().replace('[loss]\nname = "dpo"\n', ""))
    found = compare([read_finished(path) for path in (*paths, file.parent)])
    assert [group.label for group in found.groups] == ["dpo", "ipo", "dpo+sft"]


def test_few_rows_are_said(tmp_path: Path) -> None:
    trees, sums = made_pairs(8, 1.0)
    runs = [read_finished(write_run(tmp_path / loss, trees, sums, loss=loss)) for loss in ("dpo", "ipo")]
    assert compare(runs).notes == ("8 held-out rows are few: their bootstrap intervals are too narrow",)


def test_runs_without_rows_are_compared_as_far_as_they_can(tmp_path: Path) -> None:
    runs = [read_finished(write_run(tmp_path / loss, [], {}, loss=loss)) for loss in ("dpo", "ipo")]
    found = compare(runs)
    assert (found.rows, found.measures, found.differences) == (0, (), ())
    assert "no eval_rows.json" in found.notes[0] and "No held-out rows" in verdict(found)[0]


def rewarded(folder: Path, loss: str, seed: int, before: float, after: float) -> Path:
    """A run that has sampled: its rewards over three steps."""
    held_out = [{"step": 0, "eval_rollout/reward": before}, {"step": 3, "eval_rollout/reward": after}]
    training = [{"step": i, "loss": 0.0, "rollout/reward": before + i * (after - before) / 3} for i in (1, 2, 3)]
    return write_run(folder / f"{loss}{seed}", [], {}, loss=loss, seed=seed, records=[*held_out, *training])


def test_runs_that_sample_are_compared_by_their_rewards(tmp_path: Path) -> None:
    made = {("grpo", 1): (0.3, 0.8), ("grpo", 2): (0.4, 0.9), ("grpo", 3): (0.2, 0.7), ("dpo", 1): (0.3, 0.6)}
    paths = [rewarded(tmp_path, *who, *values) for who, values in made.items()]
    found = compare([read_finished(path) for path in paths])
    assert found.rewards == ["training", "held-out"] and not found.measures
    before, after = found.groups[0].reward() or pytest.fail("no reward")
    assert (before, after.mean) == pytest.approx((0.3, 0.8))
    assert after.high == pytest.approx(0.8 + 4.302653 * 0.1 / 3**0.5)  # Student's t, 2 degrees of freedom
    said = " ".join(verdict(found))
    assert "grpo: held-out reward 0.300 before, 0.800 after, 95 % interval over 3 seeds 0.552 to 1.048." in said
    assert "dpo: held-out reward 0.300 before, 0.600 after." in said and "One seed says little" in said
    assert [axes.get_title(loc="left") for axes in curves(found).axes] == ["training reward", "held-out reward"]
    lines = [line.get_ydata() for line in curves(found).axes[1].get_lines()]  # three thin ones, the mean, dpo
    assert [list(line) for line in lines] == [
        [0.3, 0.8],
        [0.4, 0.9],
        [0.2, 0.7],
        [pytest.approx(v) for v in (0.3, 0.8)],
        [0.3, 0.6],
    ]
    page, table = html(found, "t"), as_json(found)["groups"][0]["eval_reward"]
    assert "Held-out rewards" in page and "0.800, 0.900, 0.700" in page and table["after"]["mean"] == pytest.approx(0.8)
    assert float(next(csv.DictReader(as_csv(found).splitlines()))["eval_reward_after"]) == pytest.approx(0.8)
    plain = compare([read_finished(path) for path in [*paths, write_run(tmp_path / "sft", [], {}, loss="sft")]])
    assert plain.rewards == [] and "Held-out rewards" not in html(plain, "t")


def test_groups_of_one_loss_are_named_by_what_differs(tmp_path: Path) -> None:
    trees, sums = made_pairs(40, 1.0)
    runs = [
        read_finished(write_run(tmp_path / f"r{i}", trees, sums, settings={"train": {"learning_rate": rate}}))
        for i, rate in enumerate((0.1, 1e-5))
    ]
    found = compare(runs)
    assert [g.label for g in found.groups] == ["dpo (learning_rate 0.1)", "dpo (learning_rate 1e-05)"]
    assert [key for key, _ in found.settings] == ["train.learning_rate"]


def test_json_and_csv_hold_the_same_numbers(tmp_path: Path) -> None:
    found = compare([read_finished(path) for path in two_runs(tmp_path)])
    table, rows = as_json(found), list(csv.DictReader(as_csv(found).splitlines()))
    for group, row in zip(table["groups"], rows, strict=True):
        for key, value in group["measures"].items():
            assert float(row[key]) == value["over_seeds"]["mean"] == pytest.approx(value["by_seed"][0])
            assert float(row[f"{key}_rows_high"]) == value["over_rows"]["high"]
            assert row[f"{key}_low"] == ""
        assert float(row["eval_loss_after"] or "nan") != 0 and float(row["seconds"]) == 2.0
    assert len(table["differences"]) == len(found.measures)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_compares_finished_runs(tmp_path: Path) -> None:
    paths = two_runs(tmp_path)
    done = CliRunner().invoke(cli, ["compare", *map(str, paths), "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        f"comparison.{kind}" for kind in ("html", "json", "csv", "png", "pdf")
    } | {"differences.pdf"}
    assert "Highest accuracy" in done.output
    assert json.loads((tmp_path / "out/comparison.json").read_text())["baseline"] == "dpo"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give run directories"), (["a", "--recipe", "r.toml", "--losses", "dpo"], "give run directories"),
        (["a", "--seeds", "2"], "give run directories"), (["--recipe", "r.toml"], "give run directories"),
        (["{tmp}/dpo-seed42"], "one run cannot be compared"), (["{tmp}/nothing", "b"], "no run directory"),
        (["{tmp}/dpo-seed42", "{tmp}/ipo-seed42", "--baseline", "kto"], 'no "kto"'),
        (["{tmp}/dpo-seed42", "{tmp}/open"], "did not come to its end"),
    ],
)  # fmt: skip
def test_mistakes_in_the_words(words: list[str], message: str, tmp_path: Path) -> None:
    two_runs(tmp_path)
    (write_run(tmp_path / "open", *made_pairs(3, 1.0)) / "summary.json").unlink()
    done = CliRunner().invoke(cli, ["compare", *(word.replace("{tmp}", str(tmp_path)) for word in words)])
    assert done.exit_code == 2 and message in done.output
