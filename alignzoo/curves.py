"""training_curves.png: held-out values over training values, one panel for each kind of metric that has data."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from alignzoo.records import ACCURACIES, KL, PREFIXES, Record, interval, is_eval, number
from alignzoo.rundir import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = tuple[list[int], list[float]]  # steps and values
SMOOTH_FROM = 50  # logged steps from which on a running mean is drawn


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
STYLE = {
    "font.size": 8, "axes.titlesize": 9, "axes.labelsize": 8, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5, "axes.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.5, "axes.axisbelow": True,
    "svg.hashsalt": "alignzoo", "pdf.fonttype": 42,
}  # fmt: skip
_OPEN: dict[str, Any] = {"markersize": 5, "markerfacecolor": "white", "markeredgecolor": "black"}
_CHANCE: dict[str, Any] = {"color": "#555555", "linewidth": 1.0, "linestyle": (0, (1, 1.5))}


def panels(records: Sequence[Record], eval_rows: int = 0) -> list[Panel]:
    """The panels that have data, in reading order. A loss's own metrics are in the CSV, not in the plot."""
    keys = {k.removeprefix("eval_") for record in records for k, v in record.items() if number(v) is not None}
    prefix = next((p for p in PREFIXES if any(key.startswith(f"{p}/") for key in keys)), PREFIXES[0])
    accuracy = next((f"{p}/accuracies" for p in ACCURACIES if f"{p}/accuracies" in keys), "")
    rewards = [k for k in keys if k.startswith(f"{prefix}/") and not k.endswith(("/accuracies", "/ties"))]
    norms = [v for record in records if (v := number(record.get("grad_norm"))) is not None]
    wide = bool(norms) and min(norms) > 0 and max(norms) / min(norms) > 30
    offered = (
        Panel("Reward of completions", "reward", (Curve("rollout/reward"),)),
        Panel("Length of completions", "tokens", (Curve("rollout/length"),)),
        Panel("Loss", "loss", (Curve("loss"),)),
        Panel(*_REWARDS[prefix], _curves(rewards)),
        Panel("Accuracy", "accuracy", (Curve(accuracy),), chance=0.5, span=(-0.03, 1.03), rows=eval_rows),
        Panel("KL estimate", "sequence log-ratio (nats)", _curves(key for key in keys if KL.match(key))),
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
    return atomic_write(path, rendered(lambda: figure(records, title, eval_rows), "png"))


def rendered(draw: Callable[[], Figure], kind: Literal["png", "svg", "pdf"]) -> bytes:
    """A figure as a file: the same bytes each time, in the same look on every machine."""
    from matplotlib import style

    content = io.BytesIO()
    undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    with style.context(["default", STYLE]):  # the reader's own matplotlibrc may be made for dark screens
        draw().savefig(content, format=kind, dpi=150, metadata=undated)
    return content.getvalue()


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
        ends = [(v, *interval(v, rows)) for v in values if math.isfinite(v)]
        reach = [[max(0.0, v - low) for v, low, _ in ends], [max(0.0, high - v) for v, _, high in ends]]
        at = [step for step, v in zip(steps, values, strict=True) if math.isfinite(v)]
        axes.errorbar(at, [v for v, _, _ in ends], reach, fmt="none", ecolor="black", elinewidth=0.8, capsize=2.5)
    look: dict[str, Any] = {"color": colour, "linestyle": curve.line, "marker": curve.marker, "zorder": 3, **_OPEN}
    axes.plot(steps, values, linewidth=1.7, label=f"held-out {curve.key}", **look)


def _points(records: Sequence[Record], key: str) -> Points:
    """Steps and values of a metric; NaN where it was recorded as no finite number, so that the line has a gap."""
    found = [(record["step"], number(record[key])) for record in records if key in record and "step" in record]
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
