"""What a run leaves to be read: tables, curves, sample answers, closing figures."""

from __future__ import annotations

import csv
import json
import math
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from alignzoo import curves, report
from alignzoo.curves import draw_curves, figure
from alignzoo.records import PREFIXES, wilson
from alignzoo.report import (
    Sample,
    figures_table,
    finish,
    log_history,
    samples_markdown,
    samples_table,
    summary,
    write_csv,
)
from alignzoo.rundir import RunDir


def evaluation(step: int, steps: int, prefix: str) -> dict[str, float]:
    gain = step / steps
    return {
        "step": step, "epoch": gain, "eval_loss": 0.7 - 0.5 * gain, f"eval_{prefix}/chosen": gain,
        f"eval_{prefix}/rejected": -gain, f"eval_{prefix}/margins": 2 * gain,
        f"eval_{prefix}/accuracies": 0.5 + 0.4 * gain, f"eval_{prefix}/ties": 0.0 if step else 1.0,
        "eval_kl/chosen": 9 * gain, "eval_kl/rejected": -9 * gain, "eval_mean_logps/chosen": -1.6 + 0.2 * gain,
    }  # fmt: skip


def preference_records(steps: int, every: int, prefix: str = "rewards") -> list[dict[str, float]]:
    """As a run with a preference loss leaves them: an evaluation before the first step, then every so many."""
    noise, records = random.Random(0), [evaluation(0, steps, prefix)]
    for step in range(1, steps + 1):
        chosen, rejected = step / steps + noise.gauss(0, 0.1), -step / steps + noise.gauss(0, 0.1)
        records.append({
            "step": step, "epoch": step / steps, "loss": 0.7 - 0.5 * step / steps, f"{prefix}/chosen": chosen,
            f"{prefix}/rejected": rejected, f"{prefix}/margins": chosen - rejected, f"{prefix}/accuracies": 0.75,
            f"{prefix}/ties": 0.0, "kl/chosen": 10 * chosen, "kl/rejected": 10 * rejected, "logps/chosen": -60.0,
            "mean_logps/chosen": -1.5, "grad_norm": 10 + noise.random(), "learning_rate": 1e-5 * (1 - step / steps),
            "num_tokens": 1800 * step, "tokens_per_second": 400.0 + step, "memory": 1.5, "own_metric": 3.0,
        })  # fmt: skip
        if step % every == 0:
            records.append(evaluation(step, steps, prefix))
    return records


def sft_records(steps: int = 20) -> list[dict[str, float]]:
    records: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        loss = 2.0 - step / steps
        records.append({
            "step": step, "epoch": step / steps, "loss": loss, "logps/completion": -40 * loss,
            "mean_logps/completion": -loss, "grad_norm": 2.0, "learning_rate": 8e-5, "num_tokens": 900 * step,
        })  # fmt: skip
    return [*records, {"step": steps, "epoch": 1.0, "eval_loss": 1.1, "eval_mean_logps/completion": -1.1}]


# ------------------------------------------------------------------------------------------------ tables


def test_csv_round_trip(tmp_path):
    records = preference_records(8, 4)
    records[2] = {**records[2], "grad_norm": None, "note": 'a "quoted", ü\nline'}  # type: ignore[dict-item]
    write_csv(records, tmp_path / "m.csv")
    with (tmp_path / "m.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = [{k: v for k, v in record.items() if v is not None} for record in records]
    found = [{k: v if k == "note" else float(v) for k, v in row.items() if v != ""} for row in rows]
    assert found == wanted


def test_csv_columns_are_step_epoch_training_evaluation(tmp_path):
    records = [{"eval_loss": 1.0, "epoch": 0.0, "step": 0}, {"step": 1, "loss": 2.0, "a": 1.0}, {"b": 1.0, "step": 2}]
    assert report.columns(records) == ["step", "epoch", "loss", "a", "b", "eval_loss"]
    write_csv(records, tmp_path / "m.csv")
    assert (tmp_path / "m.csv").read_text().splitlines()[1] == "0,0.0,,,,1.0"


class OneWeight:
    """The least that transformers' Trainer trains and evaluates."""

    @staticmethod
    def trainer(folder: Path):
        import torch
        from transformers import Trainer, TrainingArguments

        class Module(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(1))

            def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
                return {"loss": ((self.weight * x - labels) ** 2).mean(), "logits": self.weight * x}

        rows = [{"x": float(i), "labels": 2.0 * i} for i in range(8)]
        arguments = TrainingArguments(
            str(folder), per_device_train_batch_size=2, max_steps=4, logging_steps=1, eval_strategy="steps",
            eval_steps=2, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        return Trainer(Module(), arguments, train_dataset=rows, eval_dataset=rows)


def test_log_history_is_what_a_real_trainer_leaves(tmp_path, capsys):
    """Records with Trainer's own numbers give Trainer's own list, but for what alignzoo does not measure."""
    trainer = OneWeight.trainer(tmp_path)
    trainer.train()
    trainer.state.save_to_json(str(tmp_path / "state.json"))
    theirs = json.loads((tmp_path / "state.json").read_text())["log_history"]
    *body, closing = theirs
    ours = log_history(body, seconds=closing["train_runtime"])
    assert ours[:-1] == body
    unmeasured = {"total_flos", "train_samples_per_second"}
    assert set(ours[-1]) == set(closing) - unmeasured
    assert {k: ours[-1][k] for k in ("epoch", "step", "train_runtime")} == {
        k: closing[k] for k in ("epoch", "step", "train_runtime")
    }
    assert ours[-1]["train_loss"] == pytest.approx(closing["train_loss"], rel=1e-3)
    assert ours[-1]["train_steps_per_second"] == pytest.approx(closing["train_steps_per_second"], rel=0.01)
    assert [list(record)[-2:] for record in ours] == [["epoch", "step"]] * len(ours)


def test_log_history_goes_through_a_trainer_state_and_a_model_card(tmp_path):
    from transformers.modelcard import parse_log_history
    from transformers.trainer_callback import TrainerState

    history = log_history(preference_records(8, 4), seconds=12.0)
    TrainerState(log_history=history).save_to_json(str(tmp_path / "state.json"))
    assert TrainerState.load_from_json(str(tmp_path / "state.json")).log_history == history
    train, lines, results = parse_log_history(history)
    assert train["train_runtime"] == 12.0
    assert [(line["Step"], line["Validation Loss"]) for line in lines] == [
        (0, 0.7), (4, pytest.approx(0.45)), (8, pytest.approx(0.2)),
    ]  # fmt: skip
    assert results["Loss"] == pytest.approx(0.2)


def test_log_history_holds_finite_numbers_only():
    record = {"step": 1, "epoch": 0.5, "loss": 1.0, "grad_norm": None, "non_finite": "grad_norm=inf", "x": math.nan}
    assert log_history([record]) == [{"loss": 1.0, "epoch": 0.5, "step": 1}]
    assert log_history([], seconds=1.0) == []


# ------------------------------------------------------------------------------------------------ figures


def wilson_by_quadratic(successes: float, n: int, z: float) -> tuple[float, float]:
    """The proportions p at which the observed share lies just z standard errors away: (x/n - p)^2 = z^2 p(1-p)/n."""
    share = successes / n
    a, b, c = 1 + z * z / n, -(2 * share + z * z / n), share * share
    root = math.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def test_wilson_in_numbers():
    assert wilson(50, 60) == pytest.approx((0.7196, 0.9069), abs=2e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 1.96**2 / (10 + 1.96**2)), abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 500), st.floats(0, 1), st.sampled_from([1.0, 1.96, 2.5758]))
def test_wilson_solves_its_equation(n, share, z):
    low, high = wilson(share * n, n, z)
    assert (low, high) == pytest.approx(wilson_by_quadratic(share * n, n, z), abs=1e-7)
    assert 0 <= low <= high <= 1


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (1, 0)])
def test_wilson_refuses_what_is_no_proportion(successes, n):
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, n)


def test_summary_of_a_preference_run():
    records = preference_records(8, 4)
    found = summary(records, eval_rows=60, model_path="model", seconds=90.0, recipe="dpo")
    low, high = wilson_by_quadratic(54, 60, 1.96)
    assert found["layout"] == report.LAYOUT and found["recipe"] == "dpo" and found["model"] == "model"
    assert (found["steps"], found["epoch"], found["tokens"], found["seconds"]) == (8, 1.0, 14400, 90.0)
    assert found["tokens_per_second"] == 404.5
    assert found["accuracy"] == {
        "of": "rewards", "value": pytest.approx(0.9), "low": pytest.approx(low), "high": pytest.approx(high),
        "interval": "Wilson, 95 %", "rows": 60, "ties": 0.0,
    }  # fmt: skip
    assert found["chosen_logp_per_token"] == pytest.approx(
        {"before": -1.6, "after": -1.4, "change": 0.2, "first_step": 0, "last_step": 8}
    )
    assert found["eval_loss"]["change"] == pytest.approx(-0.5)
    assert found["train"] == records[-2] and found["eval"] == records[-1] and found["first_eval"] == records[0]
    json.dumps(found, allow_nan=False)


def test_the_reward_of_a_run_that_samples_is_told_first():
    held_out = [{"step": s, "eval_rollout/reward": r, "eval_loss": 0.0} for s, r in ((0, 0.25), (4, 0.75))]
    training = [{"step": s, "rollout/reward": 0.1 * s, "rollout/length": 20.0 + s, "loss": 0.0} for s in (1, 2, 3, 4)]
    records = [held_out[0], *training, held_out[1]]
    found = summary(records, eval_rows=8, model_path="model", seconds=1.0)
    wanted = {"before": 0.25, "after": 0.75, "change": 0.5, "first_step": 0, "last_step": 4}
    assert found["eval_reward"] == pytest.approx(wanted)
    cells = [list(column.cells) for column in report.figures_table(found).columns]
    assert (cells[0][0], str(cells[1][0])) == ("held-out reward", "0.250 -> 0.750 (+0.500)")
    assert titles(records)[:2] == ["Reward of completions", "Length of completions"]


def test_summary_holds_what_was_measured_only():
    found = summary(sft_records(), eval_rows=10, model_path="model", seconds=1.0)
    assert not set(found) & {"accuracy", "first_eval", "chosen_logp_per_token", "tokens_per_second"}
    assert found["completion_logp_per_token"] == {"after": -1.1, "last_step": 20}
    empty = summary([], eval_rows=0, model_path="model", seconds=0.0)
    assert empty == {"layout": report.LAYOUT, "model": "model", "steps": 0, "seconds": 0.0, "eval_rows": 0}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_accuracy_goes_by_the_name_that_the_run_has(prefix):
    records = preference_records(8, 4, prefix)
    assert summary(records, eval_rows=60, model_path="", seconds=1.0)["accuracy"]["of"] == prefix


def printed(table: object, width: int = 120) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(table)
    console.file.close()
    return console.export_text()


def test_figures_table():
    text = printed(figures_table(summary(preference_records(8, 4), eval_rows=60, model_path="[m]", seconds=3725.2)))
    assert re.search(r"held-out loss +│ 0\.700 -> 0\.200 \(-0\.500\)", text)
    assert re.search(r"held-out accuracy +│ 0\.900 \(95 % interval 0\.799 to 0\.953, 60 rows, ties 0\.0%\)", text)
    assert re.search(r"held-out margin \(rewards\) +│ 2\.000 ", text)
    assert re.search(r"chosen log-prob per token +│ -1\.600 -> -1\.400 nats \(\+0\.200\)", text)
    assert re.search(r"held-out kl/chosen +│ 9\.000 nats", text)
    assert re.search(r"│ 1:02:05", text) and re.search(r"tokens +│ 14,400", text) and "[m]" in text


def test_figures_table_has_no_row_without_a_figure():
    text = printed(figures_table(summary(sft_records(), eval_rows=10, model_path="m", seconds=1.0)))
    assert "held-out loss" in text and "1.100" in text
    assert not re.search(r"accuracy|margin|chosen|kl|tokens per second|None|nan", text)
    assert "time" not in printed(figures_table({"steps": 3}))


# ------------------------------------------------------------------------------------------------ samples

NASTY = [
    "plain", "```python\nprint(1)\n```", "~~~~\n`````\n# no heading\n````", "a\n\n\nb\r\nc",
    "[link](x) [bold]no[/bold]", "| a | b |\n<script>&amp;", "  led by spaces\n", "````````", "[/red] \\[x]",
    "ü 漢字 🙂",
]  # fmt: skip


def fenced_blocks(markdown: str) -> list[str]:
    """The fenced blocks by the rules of CommonMark: a fence is closed by one at least as long, alone on its line."""
    blocks: list[str] = []
    fence, inside = "", []
    for line in markdown.split("\n"):
        opening = re.match(r"^(`{3,})([^`]*)$", line)
        if not fence and opening:
            fence, inside = opening[1], []
        elif fence and re.fullmatch(rf" {{0,3}}`{{{len(fence)},}} *", line):
            blocks.append("\n".join(inside))
            fence = ""
        elif fence:
            inside.append(line)
    assert not fence
    return blocks


def test_samples_survive_markdown():
    samples = [Sample(text, text + "!", text[::-1]) for text in NASTY]
    markdown = samples_markdown(samples)
    wanted = [text for sample in samples for text in (sample.prompt, sample.before, sample.after)]
    assert fenced_blocks(markdown) == wanted
    assert len(re.findall(r"^## \d+$", markdown, re.MULTILINE)) == len(samples)


@given(st.lists(st.text(alphabet="`~ \n#a", min_size=1).filter(lambda s: s.strip()), min_size=3, max_size=3))
def test_no_answer_closes_its_block(texts):
    assert fenced_blocks(samples_markdown([Sample(*texts)])) == texts


def test_empty_answers_and_changes_are_said():
    markdown = samples_markdown([Sample("a", "", "x"), Sample("b", "y", "y")])
    assert "1 of 2 answers changed" in markdown and markdown.count("(empty)") == 1


def test_samples_table_shows_text_as_it_is():
    text = printed(samples_table([Sample(t, "[red]before", "[/b] after") for t in NASTY] + [Sample("p", "", "q")]))
    assert "[bold]no[/bold]" in text and "[red]before" in text and "[/b] after" in text and "(empty)" in text


def test_samples_table_sends_no_control_characters():
    text = printed(samples_table([Sample("p", "\x1b[31mred\x07", "\x9b2J")]))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert r"\x1b[31mred\x07" in text and r"\x9b2J" in text


# ------------------------------------------------------------------------------------------------ curves

SIX = ["Loss", "Rewards", "Accuracy", "KL estimate", "Learning rate", "Gradient norm"]


def titles(records: list[dict[str, float]]) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure(records).axes]


def lines(records: list[dict[str, float]], title: str, **options: int) -> dict[str, list[list[float]]]:
    """The labelled lines of one panel: [x, y]."""
    axes = next(a for a in figure(records, **options).axes if a.get_title(loc="left") == title)
    found = {line.get_label(): [list(line.get_xdata()), list(line.get_ydata())] for line in axes.lines}
    return {label: points for label, points in found.items() if not label.startswith("_")}


def test_only_panels_with_data():
    assert titles(preference_records(8, 8)) == SIX
    assert titles(preference_records(8, 8, "log_ratios"))[1] == "Log-ratios to the reference"
    assert titles(sft_records()) == ["Loss", "Log-probs", "Learning rate", "Gradient norm"]
    assert titles([{"step": 1, "loss": 1.0}]) == ["Loss"]
    assert titles([{"step": 1, "epoch": 0.1, "own_metric": 1.0}]) == []
    assert titles([{"step": 0, "epoch": 0.0, "eval_loss": 1.0}]) == ["Loss"]


def test_held_out_values_are_drawn_over_training_values():
    records = preference_records(8, 4)
    loss = lines(records, "Loss")
    assert loss["held-out loss"] == [[0, 4, 8], pytest.approx([0.7, 0.45, 0.2])]
    assert loss["train loss"][0] == list(range(1, 9))
    assert loss["train loss"][1] == [r["loss"] for r in records if "loss" in r]
    rewards = {"rewards/chosen", "rewards/rejected", "rewards/margins"}
    assert set(lines(records, "Rewards")) == {f"{kind} {key}" for kind in ("train", "held-out") for key in rewards}
    assert set(lines(records, "KL estimate")) >= {"held-out kl/chosen", "held-out kl/rejected"}
    assert set(lines(records, "Learning rate")) == {"train learning_rate"}


def test_curves_are_told_apart_without_colour():
    axes = next(a for a in figure(preference_records(8, 4)).axes if a.get_title(loc="left") == "Rewards")
    held_out = [line for line in axes.lines if line.get_label().startswith("held-out")]
    training = [line for line in axes.lines if line.get_label().startswith("train")]
    assert len({line.get_marker() for line in held_out}) == len({str(line._dash_pattern) for line in held_out}) == 3
    assert len({str(line._dash_pattern) for line in training}) == 3
    assert all(line.get_marker() in ("", "None") for line in training)
    assert min(line.get_zorder() for line in held_out) > max(line.get_zorder() for line in training)


def test_a_long_run_is_smoothed_and_says_so():
    records = preference_records(100, 20)
    loss = lines(records, "Rewards")
    raw, smooth = loss["raw rewards/chosen"][1], loss["train rewards/chosen"][1]
    assert raw == [r["rewards/chosen"] for r in records if "rewards/chosen" in r]
    assert smooth[50] == pytest.approx(sum(raw[48:53]) / 5) and smooth[0] == pytest.approx(sum(raw[:3]) / 3)
    (legend,) = figure(records).legends
    assert "training, running mean of 5 points" in [text.get_text() for text in legend.get_texts()]
    assert set(lines(records, "Learning rate")) == {"train learning_rate"}
    short = [text.get_text() for text in figure(preference_records(8, 8)).legends[0].get_texts()]
    assert short == ["training", "held-out"]


def test_a_null_leaves_a_gap():
    records = [{"step": s, "loss": None if s == 3 else 1.0} for s in range(1, 6)]
    ys = lines(records, "Loss")["train loss"][1]  # type: ignore[arg-type]
    assert [math.isnan(y) for y in ys] == [False, False, True, False, False]


def test_accuracy_has_its_interval_and_the_line_of_chance():
    records = preference_records(8, 4)
    axes = next(a for a in figure(records, eval_rows=60).axes if a.get_title(loc="left") == "Accuracy")
    (bars,) = axes.collections
    ends = [tuple(y for _, y in segment) for segment in bars.get_segments()]
    assert ends == [pytest.approx(wilson_by_quadratic(60 * p, 60, 1.96)) for p in (0.5, 0.7, 0.9)]
    assert any(list(line.get_ydata()) == [0.5, 0.5] for line in axes.lines)


def test_a_spike_of_the_gradient_gets_a_log_scale():
    records = [{"step": s, "grad_norm": 500.0 if s == 3 else 1.0} for s in range(1, 8)]
    (axes,) = figure(records).axes
    assert axes.get_yscale() == "log" and "log" in axes.get_ylabel()
    assert figure([{"step": s, "grad_norm": 0.0 if s == 3 else 1.0} for s in range(9)]).axes[0].get_yscale() == "linear"


def words(drawing) -> list:
    """Every text that is drawn: tick labels outside the axes' limits are not."""
    found = [drawing._suptitle, *drawing.legends[0].get_texts()]
    for axes in drawing.axes:
        found += [axes._left_title, axes.xaxis.label, axes.yaxis.label, axes.yaxis.get_offset_text()]
        found += axes.get_legend().get_texts() if axes.get_legend() else []
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in found if text.get_text()]


@pytest.mark.parametrize("records", [preference_records(8, 8), preference_records(100, 10), sft_records()])
def test_no_words_of_the_plot_overlap_or_leave_it(records):
    from matplotlib import style

    with style.context(["default", curves.STYLE]):
        drawing = figure(records, "a title", eval_rows=60)
        drawing.canvas.draw()
        boxes = [(text.get_text(), text.get_window_extent(drawing.canvas.get_renderer())) for text in words(drawing)]
    assert len(boxes) > 30
    width, height = drawing.canvas.get_width_height()
    for i, (one, a) in enumerate(boxes):
        assert a.x0 >= 0 and a.x1 <= width and a.y0 >= 0 and a.y1 <= height, one
        for other, b in boxes[i + 1 :]:
            across, down = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert across <= 1 or down <= 1, (one, other)


def test_nearly_equal_values_are_written_out():
    drawing = figure([{"step": s, "loss": 0.6931 + 1e-6 * s} for s in range(5)])
    drawing.canvas.draw()
    assert drawing.axes[0].yaxis.get_offset_text().get_text() == ""


@pytest.mark.parametrize(
    ("value", "text"), [(1e-5, "1e-5"), (2.5e-6, "2.5e-6"), (0.0, "0"), (1e20, "1e20"), (-3.0, "-3")]
)
def test_ticks(value, text):
    assert curves._tick(value) == text.replace("-", "\N{MINUS SIGN}")


def test_the_png_is_written_at_150_dpi_without_pyplot(tmp_path):
    import sys

    from PIL import Image

    before = "matplotlib.pyplot" in sys.modules
    path = draw_curves(preference_records(8, 8), tmp_path / "c.png", "_a_ $\\nosuchmacro$", 60)
    with Image.open(path) as image:
        assert image.format == "PNG" and image.size[0] > 1000
        assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_the_readers_own_style_neither_shows_nor_changes(tmp_path):
    import matplotlib

    plain = draw_curves(preference_records(8, 8), tmp_path / "a.png", "t").read_bytes()
    dark = {"text.color": "white", "axes.facecolor": "black", "font.size": 20}
    with matplotlib.rc_context(dark):
        assert draw_curves(preference_records(8, 8), tmp_path / "b.png", "t").read_bytes() == plain
        assert matplotlib.rcParams["font.size"] == 20


def test_strange_metric_names_are_drawn():
    records = [{"step": s, "rewards/$x_": 1.0 * s, "rewards/_a": 2.0, "rewards/chosen": 1.0} for s in (1, 2)]
    drawing = figure(records)
    drawing.canvas.draw()
    texts = [text.get_text() for text in drawing.axes[0].get_legend().get_texts()]
    assert texts == ["chosen", r"\$x_", "_a"]


# ------------------------------------------------------------------------------------------------ the end


def test_finish_writes_every_file(tmp_path):
    run, records = RunDir.create(tmp_path, "dpo"), preference_records(8, 4)
    for record in records:
        run.append_metrics(record)
    figures = summary(run.read_metrics(), eval_rows=60, model_path="model", seconds=9.0)
    plot = finish(run, run.read_metrics(), [Sample("p", "b", "a")], {**figures, "odd": math.inf})
    assert plot == run.path / "training_curves.png" and plot.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in run.path.iterdir()} == {
        "metrics.jsonl", "training_metrics.csv", "log_history.json", "summary.json", "samples.md",
        "training_curves.png", "samples.jsonl", "report.html", "log.txt",
    }  # fmt: skip
    assert json.loads((run.path / "summary.json").read_text()) == {**figures, "odd": None, "non_finite": ["odd"]}
    assert json.loads((run.path / "log_history.json").read_text()) == log_history(records, 9.0)
    assert (run.path / "samples.md").read_text("utf-8") == samples_markdown([Sample("p", "b", "a")])


def test_finish_of_a_run_without_metrics(tmp_path):
    run = RunDir.create(tmp_path, "empty")
    plot = finish(run, [], [], summary([], eval_rows=0, model_path="model", seconds=0.0))
    assert plot.exists() and not (run.path / "samples.md").exists()
    assert json.loads((run.path / "log_history.json").read_text()) == []
