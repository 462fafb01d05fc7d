"""What a run leaves to be read: tables, curves, sample answers, closing figures. It imports no torch.

The input is the list of records of metrics.jsonl. A training record has step, epoch and the metrics; an evaluation
record has step, epoch and the metrics with the prefix "eval_". Any metric may be missing. Rewards go by "rewards/..."
or, where a loss gives none, by "log_ratios/..." or "mean_logps/...".
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignzoo.rundir import RunDir, atomic_write, nulled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

Record = Mapping[str, Any]
Points = tuple[list[int], list[float]]  # steps and values
LAYOUT = 1  # of the files of a run directory; grows when a reader of an older one would be misled
PREFIXES = ("rewards", "log_ratios", "mean_logps")  # what stands for a reward, the best first
_KL = re.compile(r"(eval_)?kl(/|$)")
SMOOTH_FROM = 50  # logged steps from which on a running mean is drawn


@dataclass(frozen=True)
class Sample:
    """One prompt and the model's answers to it."""

    prompt: str
    before: str
    after: str


def is_eval(record: Record) -> bool:
    return any(key.startswith("eval_") for key in record)


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
    numbers = [k for k, v in record.items() if k not in ("epoch", "step") and _number(v) is not None]
    return {k: record[k] for k in (*numbers, "epoch", "step") if k in record}


def _number(value: Any) -> float | None:
    """A finite number, else None."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927, JASA 22, 209-212); (0, 1) for n = 0.

    `successes` may be fractional: a tie counts one half. z = 1.96 gives 95 %.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    if n == 0:
        return 0.0, 1.0
    p, shrink = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def summary(
    records: Sequence[Record], *, eval_rows: int, model_path: str | Path, seconds: float, **more: Any
) -> dict[str, Any]:
    """The closing figures of a run, for summary.json and `figures_table`. What was not measured is absent.

    eval_rows:   held-out rows behind an evaluation
    model_path:  where the trained model was saved
    seconds:     time of the whole training
    more:        further entries, e.g. recipe="dpo"
    """
    training = [record for record in records if not is_eval(record)]
    held_out = [record for record in records if is_eval(record)]
    last: Record = training[-1] if training else {}
    speeds = [value for record in training if (value := _number(record.get("tokens_per_second"))) is not None]
    found: dict[str, Any] = {
        "layout": LAYOUT,
        **more,
        "model": str(model_path),
        "steps": last.get("step", 0),
        "epoch": last.get("epoch"),
        "seconds": seconds,
        "tokens": last.get("num_tokens"),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "eval_rows": eval_rows,
        "accuracy": _accuracy(held_out, eval_rows),
        "eval_loss": _change(held_out, "eval_loss"),
        "chosen_logp_per_token": _change(held_out, "eval_mean_logps/chosen"),
        "completion_logp_per_token": _change(held_out, "eval_mean_logps/completion"),
        "train": dict(last),
        "first_eval": dict(held_out[0]) if len(held_out) > 1 else None,
        "eval": dict(held_out[-1]) if held_out else None,
    }
    return {key: value for key, value in found.items() if value is not None and value != {}}


def _change(held_out: Sequence[Record], key: str) -> dict[str, float] | None:
    """A held-out metric at the first and the last evaluation; the last alone where there was one."""
    points = [(record.get("step", 0), value) for record in held_out if (value := _number(record.get(key))) is not None]
    if not points:
        return None
    (start, before), (end, after) = points[0], points[-1]
    last = {"after": after, "last_step": end}
    return last if len(points) == 1 else {"before": before, "change": after - before, "first_step": start, **last}


def _accuracy(held_out: Sequence[Record], rows: int) -> dict[str, Any] | None:
    """The last held-out accuracy with its interval; ties, which count one half, as a share of the rows."""
    record: Record = held_out[-1] if held_out else {}
    for prefix in PREFIXES:
        value, ties = (_number(record.get(f"eval_{prefix}/{name}")) for name in ("accuracies", "ties"))
        if value is not None:
            low, high = _interval(value, rows)
            found = {"of": prefix, "value": value, "low": low, "high": high, "interval": "Wilson, 95 %", "rows": rows}
            return found if ties is None else {**found, "ties": ties}
    return None


def _interval(share: float, rows: int) -> tuple[float, float]:
    return wilson(min(max(share, 0.0), 1.0) * rows, rows)  # a mean in floating point may pass 1 by a rounding


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
        ("held-out loss", _show_change(summary.get("eval_loss"))),
        ("held-out accuracy", _show_accuracy(summary.get("accuracy"))),
        (f"held-out margin ({prefix.replace('_', '-')})", _show(record.get(f"eval_{prefix}/margins"), unit)),
        ("chosen log-prob per token", _show_change(summary.get("chosen_logp_per_token"), " nats")),
        ("log-prob per token", _show_change(summary.get("completion_logp_per_token"), " nats")),
        *((k.replace("eval_", "held-out "), _show(v, " nats")) for k, v in record.items() if _KL.match(k)),
        ("optimizer steps", str(summary.get("steps", ""))),
        ("time (h:mm:ss)", str(timedelta(seconds=round(summary["seconds"]))) if "seconds" in summary else ""),
        ("tokens", _show(summary.get("tokens"), digits=0)),
        ("tokens per second", _show(summary.get("tokens_per_second"), digits=0)),
        ("model", str(summary.get("model", ""))),
    ]
    return [(name, value) for name, value in rows if value]


def _show(value: Any, unit: str = "", digits: int = 3) -> str:
    number = _number(value)
    return "" if number is None else f"{number:,.{digits}f}{unit}"


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
    for number, sample in enumerate(samples, start=1):
        lines += [f"## {number}", ""]
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
        table.add_row(*(Text(_visible(text)) for text in (sample.prompt, sample.before, sample.after)))
    return table


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text) or "(empty)"


@dataclass(frozen=True)
class Curve:
    """One metric of a panel. Colour, line and marker all differ: a black-and-white print tells it apart."""

    key: str
    label: str = ""
    colour: str = "#0072B2"
    line: Any = "-"
    marker: str = "o"


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    curves: tuple[Curve, ...]
    smooth: bool = True
    log: bool = False
    chance: float | None = None  # a dotted line where guessing would be
    span: tuple[float, float] | None = None  # limits of the y axis
    rows: int = 0  # held-out rows behind a proportion, for its interval

    @property
    def has_names(self) -> bool:
        """Is there a row of names between the title and the axes?"""
        return len(self.curves) > 1 or self.chance is not None


# Okabe and Ito's colours, which the colour-blind tell apart too
_ROLES = {
    "chosen": ("#0072B2", "-", "o"),
    "rejected": ("#D55E00", (0, (4, 1.5)), "s"),
    "margins": ("#009E73", (0, (5, 1.2, 1, 1.2)), "^"),
    "completion": ("#0072B2", "-", "o"),
}
_SPARE = (("#CC79A7", (0, (1, 1)), "D"), ("#56B4E9", (0, (7, 1.5)), "v"), ("#E69F00", (0, (3, 1, 1, 1, 1, 1)), "P"))
_REWARDS = {
    "rewards": ("Rewards", "reward"),  # on the loss's own scale: beta times nats for DPO
    "log_ratios": ("Log-ratios to the reference", "log-ratio (nats)"),
    "mean_logps": ("Log-probs", "log-prob (nats per token)"),
}
_STYLE = {
    "font.size": 8, "axes.titlesize": 9, "axes.labelsize": 8, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5, "axes.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.5, "axes.axisbelow": True,
}  # fmt: skip
_OPEN: dict[str, Any] = {"markersize": 5, "markerfacecolor": "white", "markeredgecolor": "black"}
_CHANCE: dict[str, Any] = {"color": "#555555", "linewidth": 1.0, "linestyle": (0, (1, 1.5))}


def panels(records: Sequence[Record], eval_rows: int = 0) -> list[Panel]:
    """The panels that have data, in reading order. A loss's own metrics are in the CSV, not in the plot."""
    keys = {k.removeprefix("eval_") for record in records for k, v in record.items() if _number(v) is not None}
    prefix = next((p for p in PREFIXES if any(key.startswith(f"{p}/") for key in keys)), PREFIXES[0])
    rewards = [k for k in keys if k.startswith(f"{prefix}/") and not k.endswith(("/accuracies", "/ties"))]
    norms = [v for record in records if (v := _number(record.get("grad_norm"))) is not None]
    wide = bool(norms) and min(norms) > 0 and max(norms) / min(norms) > 30
    offered = (
        Panel("Loss", "loss", (Curve("loss"),)),
        Panel(*_REWARDS[prefix], _curves(rewards)),
        Panel("Accuracy", "accuracy", (Curve(f"{prefix}/accuracies"),), chance=0.5, span=(-0.03, 1.03), rows=eval_rows),
        Panel("KL estimate", "sequence log-ratio (nats)", _curves(key for key in keys if _KL.match(key))),
        Panel("Learning rate", "learning rate", (Curve("learning_rate"),), smooth=False),
        Panel("Gradient norm", "L2 norm" + wide * ", log scale", (Curve("grad_norm"),), smooth=not wide, log=wide),
    )
    return [panel for panel in offered if any(curve.key in keys for curve in panel.curves)]


def _curves(keys: Iterable[str]) -> tuple[Curve, ...]:
    """Curves in the order chosen, rejected, margin, then what else there is by name."""
    order, spare = list(_ROLES), cycle(_SPARE)
    named = sorted((key.rpartition("/")[2], key) for key in keys)
    named.sort(key=lambda pair: order.index(pair[0]) if pair[0] in order else len(order))
    shown = {"margins": "margin"}
    return tuple(Curve(key, shown.get(name, name), *(_ROLES.get(name) or next(spare))) for name, key in named)


def figure(records: Sequence[Record], title: str = "", eval_rows: int = 0) -> Figure:
    """The training curves: held-out values over training values, one panel for each kind of metric that has data."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    shown = panels(records, eval_rows)
    wide = {0: 1, 1: 1, 2: 2, 4: 2}.get(len(shown), 3)
    high = max(1, math.ceil(len(shown) / wide))
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)
    drawing = Figure(figsize=(3.6 * wide, 2.75 * high + 0.55), dpi=150, layout=layout, facecolor="white")
    FigureCanvasAgg(drawing)
    drawing.suptitle(title, fontsize=10.5, parse_math=False)
    if not shown:
        drawing.text(0.5, 0.5, "no metrics were recorded", ha="center", va="center")
        return drawing
    last = max((record["step"] for record in records if "step" in record), default=1)
    window = _window(sum(not is_eval(record) for record in records))
    for place, panel in enumerate(shown):
        axes = drawing.add_subplot(high, wide, place + 1)
        row = shown[place // wide * wide : (place // wide + 1) * wide]
        _draw_panel(axes, panel, records, window if panel.smooth else 1)
        axes.set_xlim(-0.03 * last, 1.03 * last if last else 1)
        axes.set_title(panel.title, loc="left", fontweight="bold", pad=18 if any(p.has_names for p in row) else 6)
        if place >= len(shown) - wide:
            axes.set_xlabel("optimizer step")
    _explain(drawing, shown, records, window)
    return drawing


def draw_curves(records: Sequence[Record], path: Path, title: str, eval_rows: int = 0) -> Path:
    """training_curves.png. With `eval_rows` the held-out accuracy has its Wilson 95 % interval."""
    from matplotlib import style

    content = io.BytesIO()
    with style.context(["default", _STYLE]):  # the reader's own matplotlibrc may be made for dark screens
        figure(records, title, eval_rows).savefig(content, format="png", dpi=150)
    return atomic_write(path, content.getvalue())


def _draw_panel(axes: Axes, panel: Panel, records: Sequence[Record], window: int) -> None:
    if panel.chance is not None:
        axes.axhline(panel.chance, **_CHANCE)
    for curve in panel.curves:
        _draw_training(axes, curve, _points(records, curve.key), window)
        colour = curve.colour if len(panel.curves) > 1 else "black"
        _draw_held_out(axes, curve, colour, _points(records, f"eval_{curve.key}"), panel.rows)
    axes.set_ylabel(panel.unit)
    _set_ticks(axes, panel)
    if panel.has_names:
        _name_curves(axes, panel)


def _set_ticks(axes: Axes, panel: Panel) -> None:
    """Plain numbers: a shared exponent beside the axis would stand in the title."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if panel.span:
        axes.set_ylim(panel.span)
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if panel.log or not 1e-3 <= max(map(abs, axes.get_ylim())) < 1e6:
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    else:
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)


def _draw_training(axes: Axes, curve: Curve, points: Points, window: int) -> None:
    steps, values = points
    look: dict[str, Any] = {"color": curve.colour, "linestyle": curve.line, "label": f"train {curve.key}"}
    if steps and window > 1:
        axes.plot(steps, values, color=curve.colour, linewidth=0.6, alpha=0.28, label=f"raw {curve.key}")
        axes.plot(steps, _running_mean(values, window), linewidth=1.2, **look)
    elif steps:
        axes.plot(steps, values, linewidth=1.1, alpha=0.75, marker="." if len(steps) < 3 else "", **look)


def _draw_held_out(axes: Axes, curve: Curve, colour: str, points: Points, rows: int) -> None:
    steps, values = points
    if not steps:
        return
    if rows:
        ends = [(v, *_interval(v, rows)) for v in values if math.isfinite(v)]
        reach = [[max(0.0, v - low) for v, low, _ in ends], [max(0.0, high - v) for v, _, high in ends]]
        at = [step for step, v in zip(steps, values, strict=True) if math.isfinite(v)]
        axes.errorbar(at, [v for v, _, _ in ends], reach, fmt="none", ecolor="black", elinewidth=0.8, capsize=2.5)
    look: dict[str, Any] = {"color": colour, "linestyle": curve.line, "marker": curve.marker, "zorder": 3, **_OPEN}
    axes.plot(steps, values, linewidth=1.7, label=f"held-out {curve.key}", **look)


def _points(records: Sequence[Record], key: str) -> Points:
    """Steps and values of a metric; NaN where it was recorded as no finite number, so that the line has a gap."""
    found = [(record["step"], _number(record[key])) for record in records if key in record and "step" in record]
    if all(value is None for _, value in found):
        return [], []
    return [step for step, _ in found], [math.nan if value is None else value for _, value in found]


def _window(points: int) -> int:
    """Points in the running mean, odd; 1 for a short run."""
    return 1 if points < SMOOTH_FROM else 2 * min(50, max(2, round(points / 50))) + 1


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred; shorter at the ends; over the finite values."""
    around = (values[max(0, i - window // 2) : i + window // 2 + 1] for i in range(len(values)))
    finite = ([v for v in near if math.isfinite(v)] for near in around)
    return [statistics.fmean(near) if near else math.nan for near in finite]


def _tick(value: float, _: object = None) -> str:
    """1e-05 as 1e-5, with a real minus."""
    return re.sub(r"e([+-])0*(?=\d)", lambda m: "e" + m[1].strip("+"), f"{value:.6g}").replace("-", "\N{MINUS SIGN}")


def _name_curves(axes: Axes, panel: Panel) -> None:
    """The names of the curves in a row between title and axes, where no data can be."""
    from matplotlib.lines import Line2D

    looks = [{"color": c.colour, "linestyle": c.line, "marker": c.marker, **_OPEN} for c in panel.curves]
    labels = [c.label.replace("$", r"\$") for c in panel.curves]
    if panel.chance is not None:
        looks, labels = [_CHANCE], [f"{panel.chance:g}, chance"]
    handles = [Line2D([], [], label=label, **look) for label, look in zip(labels, looks, strict=True)]
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(-0.02, 0.985), ncols=len(handles), frameon=False,
        borderpad=0.2, handlelength=3.2, columnspacing=1.2, handletextpad=0.5,
    )  # fmt: skip


def _explain(drawing: Figure, shown: Sequence[Panel], records: Sequence[Record], window: int) -> None:
    """One legend below the panels: what is training, what a running mean, what held-out."""
    from matplotlib.lines import Line2D

    handles, grey = [], "#222222"
    keys = [curve.key for panel in shown for curve in panel.curves]
    if any(_points(records, key)[0] for key in keys):
        handles.append(Line2D([], [], color=grey, alpha=0.4 if window > 1 else 0.75, linewidth=1.1, label="training"))
    if window > 1:
        handles.append(Line2D([], [], color=grey, linewidth=1.2, label=f"training, running mean of {window} points"))
    if any(_points(records, f"eval_{key}")[0] for key in keys):
        label = "held-out" + ", bars: Wilson 95 % interval" * any(panel.rows for panel in shown)
        handles.append(Line2D([], [], color=grey, linewidth=1.7, marker="o", label=label, **_OPEN))
    drawing.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def finish(
    run: RunDir, records: Sequence[Record], samples: Sequence[Sample], summary: Mapping[str, Any], title: str = ""
) -> Path:
    """Writes all files of the end of a run, each whole or not at all; returns the path of the plot.

    Figures of `summary` that are no finite numbers are written as null and listed in its "non_finite".
    """
    write_csv(records, run.path / "training_metrics.csv")
    run.write_json("log_history.json", log_history(records, _number(summary.get("seconds"))))
    finite, lost = nulled(summary)
    run.write_json("summary.json", {**finite, "non_finite": lost} if lost else finite)
    if samples:
        run.write_text("samples.md", samples_markdown(samples))
    plot = run.path / "training_curves.png"
    return draw_curves(records, plot, title or run.path.name, int(summary.get("eval_rows", 0)))
