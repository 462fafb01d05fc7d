"""The plots of a comparison: held-out curves over each other, and differences from the baseline with intervals."""

from __future__ import annotations

import math
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from alignzoo.compare import Comparison, Points
from alignzoo.measures import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind; lines and markers differ too, for a black-and-white print
_LOOKS: tuple[tuple[str, Any, str], ...] = (
    ("#0072B2", "-", "o"), ("#D55E00", (0, (4, 1.5)), "s"), ("#009E73", (0, (5, 1.2, 1, 1.2)), "^"),
    ("#CC79A7", (0, (1, 1)), "D"), ("#E69F00", (0, (7, 1.5)), "v"), ("#56B4E9", (0, (3, 1, 1, 1, 1, 1)), "P"),
    ("#000000", (0, (2, 2)), "X"),
)  # fmt: skip
_SHOWN = ("accuracy", "margin", "mean_logp_accuracy", "chosen_shift", "rejected_shift", "chosen_logp")
_PANELS = 4  # at most


def looks(count: int) -> list[dict[str, Any]]:
    """Colour, line and marker of each group."""
    found = islice(cycle(_LOOKS), count)
    return [{"color": colour, "linestyle": line, "marker": marker} for colour, line, marker in found]


def curve_panels(comparison: Comparison) -> list[Measure]:
    """The measures that are drawn, in the order of _SHOWN."""
    there = {measure.key: measure for measure in comparison.measures}
    return [there[key] for key in _SHOWN if key in there][:_PANELS]


def curves(comparison: Comparison) -> Figure:
    """A panel for each measure and reward; a line for each group's mean over the seeds, and thin ones for the seeds."""
    shown: list[Measure | str] = [*curve_panels(comparison), *comparison.rewards]
    wide = min(2, max(1, len(shown)))
    drawing = _figure(3.5 * wide, 2.6 * math.ceil(max(1, len(shown)) / wide) + 0.4)
    if not shown:
        drawing.text(0.5, 0.5, "no held-out rows are shared by all", ha="center", va="center")
        return drawing
    for place, measure in enumerate(shown):
        axes = drawing.add_subplot(math.ceil(len(shown) / wide), wide, place + 1)
        for group, look in zip(comparison.groups, looks(len(comparison.groups)), strict=True):
            lines = group.rewards[measure] if isinstance(measure, str) else group.curves[measure.key]
            _draw_group(axes, lines, look)
        title, unit = (f"{measure} reward", "reward") if isinstance(measure, str) else (measure.title, measure.unit)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_ylabel(unit)
        if isinstance(measure, Measure) and measure.share:
            axes.axhline(0.5, color="#555555", linewidth=0.8, linestyle=(0, (1, 1.5)))
            axes.set_ylim(min(0.4, axes.get_ylim()[0]), 1.02)
        if place >= len(shown) - wide:
            axes.set_xlabel("optimizer step")
    _legend(drawing, comparison)
    return drawing


def _draw_group(axes: Axes, lines: list[Points], look: dict[str, Any]) -> None:
    if len(lines) > 1:
        for steps, values in lines:
            axes.plot(steps, values, color=look["color"], linewidth=0.6, alpha=0.35)
    common = sorted(set.intersection(*(set(steps) for steps, _ in lines)))
    tables = [dict(zip(steps, values, strict=True)) for steps, values in lines]
    mean = [sum(table[step] for table in tables) / len(tables) for step in common]
    every = max(1, len(common) // 12)  # a marker at each of many steps would hide the line
    axes.plot(common, mean, linewidth=1.5, markersize=4, markerfacecolor="white", markevery=every, **look)


def differences(comparison: Comparison) -> Figure:
    """Each group minus the baseline with its 95 % interval, a panel for each measure. There is a group beside it."""
    shown = curve_panels(comparison)
    others = [(g, look) for g, look in zip(comparison.groups, looks(len(comparison.groups)), strict=True)
              if g.label != comparison.baseline]  # fmt: skip
    drawing = _figure(2.4 * len(shown) + 0.6, 0.32 * len(others) + 1.1)
    for place, measure in enumerate(shown):
        axes = drawing.add_subplot(1, len(shown), place + 1)
        axes.axvline(0.0, color="#555555", linewidth=0.8)
        by_label = {d.label: d.estimate for d in comparison.differences if d.measure is measure}
        for row, (group, look) in enumerate(others):
            found = by_label[group.label]
            if found.low is not None and found.high is not None:
                axes.plot([found.low, found.high], [row, row], color=look["color"], linewidth=1.6)
            axes.plot([found.mean], [row], color=look["color"], marker=look["marker"], markersize=5, linestyle="")
        axes.set_yticks(range(len(others)), [_plain(g.label) for g, _ in others] if place == 0 else [""] * len(others))
        axes.set_ylim(len(others) - 0.5, -0.5)
        axes.set_title(measure.title, loc="left", fontweight="bold", fontsize=7.5)
        axes.set_xlabel(f"{measure.unit}, minus {_plain(comparison.baseline)}", fontsize=7)
        axes.locator_params(axis="x", nbins=5)
    return drawing


def _legend(drawing: Figure, comparison: Comparison) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], label=_plain(group.label), markersize=4, markerfacecolor="white", **look)
        for group, look in zip(comparison.groups, looks(len(comparison.groups)), strict=True)
    ]
    drawing.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False)


def _plain(text: str) -> str:
    """A label that matplotlib does not take for mathematics. A name of a loss begins with no underscore."""
    return text.replace("$", r"\$")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    drawing = Figure(figsize=(width, height), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    FigureCanvasAgg(drawing)
    drawing.set_facecolor("white")
    return drawing
