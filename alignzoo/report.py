"""What a run leaves to be read: tables, curves, sample answers, closing figures. It imports no torch.

The input is the list of records of metrics.jsonl. A training record has step, epoch and the metrics; an evaluation
record has step, epoch and the metrics with the prefix "eval_". Any metric may be missing. Rewards go by "rewards/..."
or, where a loss gives none, by "log_ratios/..." or "mean_logps/...".
"""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignzoo.curves import draw_curves
from alignzoo.pages import visible
from alignzoo.readrun import LOG, SAMPLES, read_run
from alignzoo.records import ACCURACIES, KL, PREFIXES, Record, Sample, interval, is_eval, number
from alignzoo.rundir import RunDir, atomic_write, nulled, strict_json
from alignzoo.runpage import run_page

if TYPE_CHECKING:
    from rich.table import Table

LAYOUT = 1  # of the files of a run directory; grows when a reader of an older one would be misled


def columns(records: Iterable[Record]) -> list[str]:
    """Every key of the records: step, epoch, those of training, those of evaluation, each as they first appear."""
    keys = dict.fromkeys(key for record in records for key in record)
    place = {"step": 0, "epoch": 1}
    return sorted(keys, key=lambda key: place.get(key, 3 if key.startswith("eval_") else 2))


def write_csv(records: Sequence[Record], path: Path) -> Path:
    """One row per record, numbers in full precision, an empty cell where a record lacks the metric."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(records), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return atomic_write(path, text.getvalue().encode("utf-8"))


def log_history(records: Sequence[Record], seconds: float | None = None) -> list[dict[str, float | int]]:
    """The records as transformers' Trainer keeps them in state.log_history: finite numbers, then epoch and step.

    Words and nulls have no place in that list and are left out of it; metrics.jsonl and the CSV have them. With
    `seconds`, the time of the training, it ends as Trainer's does with train_runtime, train_steps_per_second and
    train_loss, the mean of the logged losses. (Trainer's samples per second and FLOPs are not measured.)
    """
    history = [_numbers(record) for record in records]
    trained = [record for record in history if "loss" in record]
    if seconds is not None and trained:
        last: dict[str, float | int] = {key: trained[-1][key] for key in ("epoch", "step") if key in trained[-1]}
        closing = {
            "train_runtime": round(seconds, 4),
            "train_steps_per_second": round(last.get("step", 0) / max(seconds, 1e-9), 3),
            "train_loss": statistics.fmean(record["loss"] for record in trained),
        }
        history.append({**closing, **last})
    return history


def _numbers(record: Record) -> dict[str, float | int]:
    numbers = [k for k, v in record.items() if k not in ("epoch", "step") and number(v) is not None]
    return {k: record[k] for k in (*numbers, "epoch", "step") if k in record}


def summary(
    records: Sequence[Record],
    *,
    eval_rows: int,
    eval_pairs: int = 0,
    model_path: str | Path,
    seconds: float,
    **more: Any,
) -> dict[str, Any]:
    """The closing figures of a run, for summary.json and `figures_table`. What was not measured is absent.

    eval_rows:   held-out rows behind an evaluation
    eval_pairs:  held-out pairs that a loss on other data was measured on too
    model_path:  where the trained model was saved
    seconds:     time of the whole training
    more:        further entries, e.g. recipe="dpo", or warnings=[...], lines of RunDir.read_warnings
    """
    training = [record for record in records if not is_eval(record)]
    held_out = [record for record in records if is_eval(record)]
    last: Record = training[-1] if training else {}
    memory = [value for record in training if (value := number(record.get("memory"))) is not None]
    speeds = [value for record in training if (value := number(record.get("tokens_per_second"))) is not None]
    found: dict[str, Any] = {
        "layout": LAYOUT,
        **more,
        "model": str(model_path),
        "steps": last.get("step", 0),
        "epoch": last.get("epoch"),
        "seconds": seconds,
        "tokens": last.get("num_tokens"),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "memory": max(memory, default=None),
        "eval_rows": eval_rows,
        "accuracy": _accuracy(held_out, eval_rows, eval_pairs),
        "eval_loss": _change(held_out, "eval_loss"),
        "eval_reward": _change(held_out, "eval_rollout/reward"),
        "chosen_logp_per_token": _change(held_out, "eval_mean_logps/chosen"),
        "completion_logp_per_token": _change(held_out, "eval_mean_logps/completion"),
        "train": dict(last),
        "first_eval": dict(held_out[0]) if len(held_out) > 1 else None,
        "eval": dict(held_out[-1]) if held_out else None,
    }
    return {key: value for key, value in found.items() if value is not None and value != {}}


def _change(held_out: Sequence[Record], key: str) -> dict[str, float] | None:
    """A held-out metric at the first and the last evaluation; the last alone where there was one."""
    points = [(record.get("step", 0), value) for record in held_out if (value := number(record.get(key))) is not None]
    if not points:
        return None
    (start, before), (end, after) = points[0], points[-1]
    last = {"after": after, "last_step": end}
    return last if len(points) == 1 else {"before": before, "change": after - before, "first_step": start, **last}


def _accuracy(held_out: Sequence[Record], rows: int, pairs: int) -> dict[str, Any] | None:
    """The last held-out accuracy with its interval; ties, which count one half, as a share of the rows."""
    record: Record = held_out[-1] if held_out else {}
    for prefix in ACCURACIES:
        value, ties = (number(record.get(f"eval_{prefix}/{name}")) for name in ("accuracies", "ties"))
        if value is not None:
            n = pairs if prefix == "pairs" else rows
            low, high = interval(value, n)
            found = {"of": prefix, "value": value, "low": low, "high": high, "interval": "Wilson, 95 %", "rows": n}
            return found if ties is None else {**found, "ties": ties}
    return None


def figures_table(summary: Mapping[str, Any]) -> Table:
    """The closing figures for the terminal: a row for each that was measured."""
    from rich.table import Column, Table
    from rich.text import Text

    table = Table("figure", Column("value", overflow="fold"), title="Figures", title_justify="left", show_header=False)
    for name, value in _figures(summary):
        table.add_row(name, Text(value))
    return table


def _figures(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    record: Record = summary.get("eval", {})
    prefix = next((p for p in PREFIXES if f"eval_{p}/margins" in record or f"eval_{p}/chosen" in record), "")
    unit = {"rewards": "", "log_ratios": " nats", "mean_logps": " nats per token"}.get(prefix, "")
    rows = [
        ("held-out reward", _show_change(summary.get("eval_reward"))),
        ("held-out loss", _show_change(summary.get("eval_loss"))),
        ("held-out accuracy", _show_accuracy(summary.get("accuracy"))),
        ("held-out margin (pairs)", _show(record.get("eval_pairs/margins"))),
        (f"held-out margin ({prefix.replace('_', '-')})", _show(record.get(f"eval_{prefix}/margins"), unit)),
        ("chosen log-prob per token", _show_change(summary.get("chosen_logp_per_token"), " nats")),
        ("log-prob per token", _show_change(summary.get("completion_logp_per_token"), " nats")),
        *((k.replace("eval_", "held-out "), _show(v, " nats")) for k, v in record.items() if KL.match(k)),
        ("optimizer steps", str(summary.get("steps", ""))),
        ("time (h:mm:ss)", str(timedelta(seconds=round(summary["seconds"]))) if "seconds" in summary else ""),
        ("tokens", _show(summary.get("tokens"), digits=0)),
        ("tokens per second", _show(summary.get("tokens_per_second"), digits=0)),
        ("warnings", ", ".join(dict.fromkeys(one["warning"] for one in summary.get("warnings", [])))),
        ("model", str(summary.get("model", ""))),
    ]
    return [(name, value) for name, value in rows if value]


def _show(value: Any, unit: str = "", digits: int = 3) -> str:
    found = number(value)
    return "" if found is None else f"{found:,.{digits}f}{unit}"


def _show_change(change: Mapping[str, float] | None, unit: str = "") -> str:
    if not change or "before" not in change:
        return _show((change or {}).get("after"), unit)
    return f"{change['before']:.3f} -> {change['after']:.3f}{unit} ({change['change']:+.3f})"


def _show_accuracy(accuracy: Mapping[str, Any] | None) -> str:
    if accuracy is None:
        return ""
    ties = f", ties {accuracy['ties']:.1%}" if "ties" in accuracy else ""
    interval = f"95 % interval {accuracy['low']:.3f} to {accuracy['high']:.3f}"
    return f"{accuracy['value']:.3f} ({interval}, {accuracy['rows']} rows{ties})"


def samples_markdown(samples: Sequence[Sample]) -> str:
    """samples.md: every prompt and answer in a fenced block that nothing inside it can close."""
    changed = sum(sample.before != sample.after for sample in samples)
    lines = ["# Answers before and after", "", f"{changed} of {len(samples)} answers changed.", ""]
    for place, sample in enumerate(samples, start=1):
        lines += [f"## {place}", ""]
        for title, text in (("Prompt", sample.prompt), ("Before", sample.before), ("After", sample.after)):
            lines += [f"**{title}**", "", _fenced(text), ""]
    return "\n".join(lines)


def _fenced(text: str) -> str:
    if not text.strip():
        return "(empty)"
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def samples_table(samples: Sequence[Sample]) -> Table:
    """The answers side by side for the terminal; control characters are shown, not sent."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Answers before and after", title_justify="left", show_lines=True)
    for column, ratio in (("prompt", 2), ("before", 3), ("after", 3)):
        table.add_column(column, ratio=ratio, overflow="fold")
    for sample in samples:  # Text, since [brackets] in a str would be read as markup
        table.add_row(*(Text(visible(text)) for text in (sample.prompt, sample.before, sample.after)))
    return table


def finish(
    run: RunDir,
    records: Sequence[Record],
    samples: Sequence[Sample],
    summary: Mapping[str, Any],
    title: str = "",
    said: Sequence[str] = (),
) -> Path:
    """Writes all files of the end of a run, each whole or not at all; returns the path of the plot.

    said: what the run has said, a line each
    Figures of `summary` that are no finite numbers are written as null and listed in its "non_finite".
    """
    write_csv(records, run.path / "training_metrics.csv")
    run.write_json("log_history.json", log_history(records, number(summary.get("seconds"))))
    if samples:
        run.write_text("samples.md", samples_markdown(samples))
        run.write_text(SAMPLES, "".join(strict_json(asdict(one), SAMPLES) + "\n" for one in samples))
    run.write_text(LOG, "".join(f"{line}\n" for line in said))
    plot, rows = run.path / "training_curves.png", int(summary.get("accuracy", {}).get("rows", 0))
    draw_curves(records, plot, title or run.path.name, rows)
    finite, lost = nulled(summary)
    figures = {**finite, "non_finite": lost} if lost else finite
    run.write_text("report.html", run_page(read_run(run.path, figures), title or run.path.name, _figures(figures)))
    run.write_json("summary.json", figures)  # last: a run with a summary is a finished one
    return plot
