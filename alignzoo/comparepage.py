"""A comparison on one page, as JSON, as CSV, as plots, and in the terminal. It imports no torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignzoo.compare import SEED, Comparison, Group, last_loss
from alignzoo.compareplot import curves, differences
from alignzoo.curves import rendered
from alignzoo.measures import Measure
from alignzoo.pages import Image, Table, page, shown
from alignzoo.readrun import Run
from alignzoo.resampling import RESAMPLES, Estimate
from alignzoo.rundir import atomic_write, nulled, strict_json
from alignzoo.runpage import cache_in_words, footer, made_from

if TYPE_CHECKING:
    from rich.table import Table as RichTable

LAYOUT = 1  # of comparison.json; grows when a reader of an older one would be misled
_OWN = ("rewards/margins", "rewards/accuracies", "log_ratios/margins", "mean_logps/margins")


def write(comparison: Comparison, folder: Path, title: str, notes: Sequence[str] = ()) -> Path:
    """comparison.html, .json, .csv, .png and .pdf, and differences.pdf, in a folder; returns the path of the page.

    notes: what is to be read first, beside what the comparison itself found
    """
    for kind in ("png", "pdf"):
        atomic_write(folder / f"comparison.{kind}", rendered(lambda: curves(comparison), kind))
    if comparison.differences:
        atomic_write(folder / "differences.pdf", rendered(lambda: differences(comparison), "pdf"))
    table, _ = nulled(as_json(comparison, notes))
    text = strict_json(table, "comparison.json", indent=2) + "\n"
    atomic_write(folder / "comparison.json", text.encode("utf-8"))
    atomic_write(folder / "comparison.csv", as_csv(comparison).encode("utf-8"))
    return atomic_write(folder / "comparison.html", html(comparison, title, notes).encode("utf-8"))


# --- numbers ---------------------------------------------------------------------------------------------------------


def as_json(comparison: Comparison, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Everything in numbers."""
    return {
        "layout": LAYOUT,
        "baseline": comparison.baseline,
        "held_out_rows": comparison.rows,
        "notes": [*notes, *comparison.notes],
        "intervals": {"seeds": "Student's t, 95 %", "rows": f"bootstrap, {RESAMPLES} resamples, seed {SEED}, 95 %"},
        "groups": [_group_json(comparison, group) for group in comparison.groups],
        "differences": [
            {"group": d.label, "minus": comparison.baseline, "measure": d.measure.key, **asdict(d.estimate)}
            for d in comparison.differences
        ],
        "settings": dict(comparison.settings),
    }


def _group_json(comparison: Comparison, group: Group) -> dict[str, Any]:
    before, after = last_loss(group)
    measures = {}
    for measure in comparison.measures:
        measures[measure.key] = {
            "over_seeds": asdict(group.estimate(measure)),
            "over_rows": asdict(group.over_rows(measure)),
            "by_seed": [float(values.mean()) for values in group.measured[measure.key]],
        }
    reward = group.reward()
    return {
        "label": group.label,
        "loss": group.runs[0].loss,
        "seeds": group.seeds,
        "runs": [str(run.path) for run in group.runs],
        "measures": measures,
        "eval_loss": {"before": before, "after": after},
        **({} if reward is None else {"eval_reward": {"before": reward[0], "after": asdict(reward[1])}}),
        "cost": group.costs(),
    }


def as_csv(comparison: Comparison) -> str:
    """A row for each group, numbers in full; an empty cell where there is none."""
    rows = []
    for group in comparison.groups:
        row: dict[str, Any] = {"group": group.label, "loss": group.runs[0].loss, "seeds": len(group.runs)}
        for measure in comparison.measures:
            found, over_rows = group.estimate(measure), group.over_rows(measure)
            row |= {measure.key: found.mean, f"{measure.key}_low": found.low, f"{measure.key}_high": found.high}
            row |= {f"{measure.key}_rows_low": over_rows.low, f"{measure.key}_rows_high": over_rows.high}
        row["eval_loss_before"], row["eval_loss_after"] = last_loss(group)
        if reward := group.reward():
            row |= {"eval_reward_before": reward[0], "eval_reward_after": reward[1].mean}
        rows.append(row | group.costs())
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# --- words -----------------------------------------------------------------------------------------------------------


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def plain(value: float) -> str:
    return f"{value:.3f}".replace("-", "\N{MINUS SIGN}")


def between(found: Estimate) -> str:
    """ "0.012 to 0.031" """
    return "" if found.low is None or found.high is None else f"{plain(found.low)} to {plain(found.high)}"


def verdict(comparison: Comparison) -> list[str]:
    """The main measure in sentences: who has most of it, and whom the data tell from the baseline."""
    main, base = comparison.main, comparison.baseline
    if main is None and "held-out" in comparison.rewards:
        return list(_reward_verdict(comparison))
    if main is None:
        return ["No held-out rows are shared by all runs: only curves, costs and each loss's own figures are here."]
    means = {group.label: float(group.rows(main.key).mean()) for group in comparison.groups}
    top = max(means.values())
    best = [label for label, mean in means.items() if mean == top]
    lines = [f"Highest {main.title}: {plain(top)} ({', '.join(best)}), over {comparison.rows} held-out rows."]
    found = [d for d in comparison.differences if d.measure is main]
    for one in found:
        words = f"{'higher' if one.estimate.mean > 0 else 'lower'} than {base}"
        ending = words if one.estimate.clear else f"no difference from {base} is shown"
        interval = between(one.estimate)
        extra = f" (95 % interval {interval})" if interval else ""
        lines.append(f"{one.label}: {signed(one.estimate.mean)}{extra}: {ending}.")
    if len(found) > 1:
        lines.append(f"Each interval is made for itself: that all {len(found)} hold is less certain than 95 %.")
    return lines


def _reward_verdict(comparison: Comparison) -> Iterator[str]:
    """Where completions were sampled, so that there are no rows in common."""
    yield "No held-out rows are shared by all runs: what is compared is the mean reward of sampled completions."
    for group in comparison.groups:
        before, after = found_reward(group)
        interval = f", 95 % interval over {len(group.runs)} seeds {between(after)}" if between(after) else ""
        yield f"{group.label}: held-out reward {plain(before)} before, {plain(after.mean)} after{interval}."
    if any(len(group.runs) < 2 for group in comparison.groups):
        yield "One seed says little here: another one samples other completions (--seeds 3)."


def found_reward(group: Group) -> tuple[float, Estimate]:
    found = group.reward()
    assert found is not None
    return found


def _reward_table(comparison: Comparison) -> Table:
    """Nothing where not all groups have sampled held-out completions."""
    rows = []
    for group in comparison.groups if "held-out" in comparison.rewards else ():
        before, after = found_reward(group)
        by_seed = ", ".join(plain(values[-1]) for _, values in group.rewards["held-out"])
        rows.append([group.label, str(len(group.runs)), plain(before), _cell(after), by_seed])
    caption = (
        "Mean reward of completions sampled for the held-out prompts, by [[rewards]] and its weights. In brackets: 95 "
        "% intervals over seeds (Student's t)."
    )
    return Table(["loss", "seeds", "before", "after", "after, seed by seed"], rows, caption)


def results(comparison: Comparison) -> Table:
    """The final table: means over rows and seeds."""
    main = comparison.main
    header = ["loss", "seeds", *(f"{m.title} ({m.unit})" for m in comparison.measures)]
    if main is not None:
        header.insert(3, f"{main.title}, over rows")
    rows = []
    for group in comparison.groups:
        cells = [_cell(group.estimate(measure)) for measure in comparison.measures]
        if main is not None:
            cells.insert(1, between(group.over_rows(main)))
        rows.append([group.label, str(len(group.runs)), *cells])
    single = [group.label for group in comparison.groups if len(group.runs) == 1]
    words = "In brackets: 95 % intervals over seeds (Student's t). " if len(single) < len(comparison.groups) else ""
    if single:
        words += f"One seed each, so no interval over seeds: {', '.join(single)}. "
    words += f"Over rows: 95 % bootstrap interval over the {comparison.rows} held-out rows, the trained models given."
    marked = {i for i, group in enumerate(comparison.groups) if group.label == comparison.baseline}
    return Table(header, rows, f"{words} Marked: the baseline.", frozenset(marked))


def _cell(found: Estimate) -> str:
    interval = between(found)
    return f"{plain(found.mean)}\n({interval})" if interval else plain(found.mean)


def _difference_table(comparison: Comparison) -> Table:
    rows = []
    for group in comparison.groups:
        found = {d.measure.key: d.estimate for d in comparison.differences if d.label == group.label}
        if found:
            rows.append([group.label, *(_difference(found[m.key]) for m in comparison.measures)])
    caption = (
        f"Paired bootstrap over the {comparison.rows} held-out rows that all runs share: {RESAMPLES:,} resamples, seed "
        f"{SEED}, 95 % percentile intervals. A row's value is its mean over the seeds, so the intervals tell what "
        "other rows would give, not what other seeds would. *: the interval leaves out 0."
    )
    return Table(["loss", *(f"{m.title} ({m.unit})" for m in comparison.measures)], rows, caption)


def _difference(found: Estimate) -> str:
    return f"{signed(found.mean)}{' *' if found.clear else ''}\n({between(found)})"


def _own_table(comparison: Comparison) -> Table:
    keys = [key for key in _OWN if any(group.figure(f"eval.eval_{key}") is not None for group in comparison.groups)]
    rows = []
    for group in comparison.groups:
        before, after = last_loss(group)
        own = [shown(group.figure(f"eval.eval_{key}")) for key in keys]
        rows.append([group.label, shown(before), shown(after), *own])
    caption = (
        "A loss and its rewards are in units of its own (beta, tau, an odds ratio): compare within a row, over time, "
        "and not down a column."
    )
    return Table(["loss", "held-out loss before", "after", *keys], rows, caption)


def _cost_table(comparison: Comparison) -> Table:
    header = ("loss", "steps", "training rows", "time (h:mm:ss)", "tokens per second", "peak memory (GiB)", "reference")
    rows = []
    for group in comparison.groups:
        cost = group.costs()
        time = str(timedelta(seconds=round(cost["seconds"]))) if "seconds" in cost else ""
        numbers = [f"{cost[key]:,.0f}" if key in cost else "" for key in ("steps", "train_rows", "tokens_per_second")]
        memory = f"{cost['memory']:.2f}" if "memory" in cost else ""
        cache = cache_in_words(group.runs[0]) or "none is kept"
        rows.append([group.label, numbers[0], numbers[1], time, numbers[2], memory, cache])
    return Table(header, rows, "Means over the seeds; the reference's log-probs as the first seed's run found them.")


# --- the page --------------------------------------------------------------------------------------------------------


def html(comparison: Comparison, title: str, notes: Sequence[str] = ()) -> str:
    groups, runs = comparison.groups, comparison.runs
    forest = rendered(lambda: differences(comparison), "svg") if comparison.differences else b""
    labels = [group.label for group in groups]
    return page(
        "compare.html",
        title=title,
        header=Table((), _facts(comparison)),
        notes=[*notes, *comparison.notes],
        verdict=verdict(comparison),
        rewards=_reward_table(comparison),
        results=results(comparison),
        meanings=[f"{_in_words(measure)}: {measure.meaning}" for measure in comparison.measures],
        baseline=comparison.baseline,
        differences=_difference_table(comparison),
        forest=Image(forest, f"Differences from {comparison.baseline} with 95 % intervals, as in the table below"),
        curves=Image(rendered(lambda: curves(comparison), "svg"), "Held-out measures over the steps, a line a loss"),
        many_seeds=any(len(group.runs) > 1 for group in groups),
        own=_own_table(comparison),
        answer_header=["prompt", "before", *labels],
        samples=_answers(groups),
        cost=_cost_table(comparison),
        settings=Table(["setting", *labels], [[key, *map(shown, row.values())] for key, row in comparison.settings]),
        warnings=_warnings(runs),
        runs=Table(
            ("run", "loss", "seed", "started"),
            [(str(r.path), g.label, str(r.seed), str(r.manifest.get("started", ""))) for g in groups for r in g.runs],
        ),
        made_from=Table((), [row for row in made_from(runs[0]) if row[0] != "command"], f"Of {runs[0].path.name}."),
        footer=footer(runs[0]),
    )  # fmt: skip


def _in_words(measure: Measure) -> str:
    return f"{measure.title} ({measure.unit})"


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    runs = comparison.runs
    seeds = sorted({run.seed for run in runs})
    rows = [
        ("recipe", ", ".join(sorted({str(run.summary.get("recipe", "")) for run in runs}))),
        ("compared", ", ".join(group.label for group in comparison.groups)),
        ("baseline", comparison.baseline),
        ("start model", ", ".join(sorted({str(run.recipe.get("model", {}).get("path", "")) for run in runs}))),
        ("held-out rows", str(comparison.rows)),
        ("seeds", ", ".join(map(str, seeds))),
    ]
    return [row for row in rows if row[1]]


def _answers(groups: Sequence[Group]) -> list[list[str]]:
    """Prompt, answer before, and each group's answer after, of its first seed."""
    first = groups[0].runs[0]
    after = [{sample.prompt: sample.after for sample in group.runs[0].samples} for group in groups]
    return [[s.prompt, s.before, *(table.get(s.prompt, "not asked") for table in after)] for s in first.samples]


def _warnings(runs: Sequence[Run]) -> list[str]:
    """Each warning once, with the runs that gave it."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for warning in dict.fromkeys(run.warnings):
            found.setdefault(warning, []).append(run.path.name)
    return [f"{warning} ({', '.join(names)})" for warning, names in found.items()]


def terminal_table(comparison: Comparison) -> RichTable:
    """The final table for the terminal, its most asked columns."""
    from rich.table import Table as RichTable
    from rich.text import Text

    shown_measures = comparison.measures[:3]
    table = RichTable("loss", "seeds", *(f"{m.title} ({m.unit})" for m in shown_measures), "time", title="Held out",
                      title_justify="left")  # fmt: skip
    for group in comparison.groups:
        cells = [_cell(group.estimate(measure)) for measure in shown_measures]
        time = str(timedelta(seconds=round(group.costs().get("seconds", 0))))
        table.add_row(*map(Text, (group.label, str(len(group.runs)), *cells, time)))
    return table
