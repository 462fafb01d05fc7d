"""Finished runs beside each other: what differs in how they were made, and in what they came to. It imports no torch.

Runs that differ in nothing but the seed are one group. Its intervals over seeds are Student's t; groups are compared
by a paired bootstrap over the held-out rows that all runs share, each row's value averaged over the seeds first.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignzoo.errors import AlignzooError
from alignzoo.measures import MEASURES, Measure, Values, start_of, sums_of
from alignzoo.pages import shown
from alignzoo.readrun import Run
from alignzoo.records import number
from alignzoo.resampling import Estimate, bootstrap, over_seeds
from alignzoo.resume import flat

SEED = 0  # of the bootstrap
REWARDS = {"training": "rollout/reward", "held-out": "eval_rollout/reward"}  # of sampled completions, from [[rewards]]
_OWN = ("train.seed", "output.dir", "log.run_name")  # what runs of one group may differ in
_FEW = 30  # rows
_COSTS = ("steps", "train_rows", "seconds", "tokens", "tokens_per_second", "memory")  # of summary.json
Points = tuple[list[int], list[float]]  # steps and values


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one recipe with different seeds, in the order of these."""

    label: str
    runs: tuple[Run, ...]
    measured: Mapping[str, list[Values]]  # key of a measure -> for each run (R,), at its last evaluation
    curves: Mapping[str, list[Points]]  # key of a measure -> for each run its means over the rows
    rewards: Mapping[str, list[Points]]  # "training", "held-out" -> for each run; what not all of them have is left out

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    def estimate(self, measure: Measure) -> Estimate:
        """A measure's mean over rows and seeds, with its interval over seeds, of a share cut at 0 and 1."""
        found = over_seeds([float(v.mean()) for v in self.measured[measure.key]])
        return found.within(0.0, 1.0) if measure.share else found

    def over_rows(self, measure: Measure) -> Estimate:
        """The same mean, with its interval over the held-out rows."""
        return bootstrap(self.rows(measure.key), seed=SEED)

    def rows(self, key: str) -> Values:
        """A measure of each row, averaged over the seeds, (R,)."""
        mean: Values = np.stack(self.measured[key]).mean(0)
        return mean

    def reward(self) -> tuple[float, Estimate] | None:
        """The mean held-out reward at the first evaluation, and at the last with its interval over seeds."""
        if "held-out" not in self.rewards:
            return None
        values = [of for _, of in self.rewards["held-out"]]
        return statistics.fmean(of[0] for of in values), over_seeds([of[-1] for of in values])

    def figure(self, key: str) -> float | None:
        """The mean over the runs of a number in summary.json; None where a run lacks it."""
        values = [_at(run.summary, key) for run in self.runs]
        return None if None in values else statistics.fmean(v for v in values if v is not None)

    def costs(self) -> dict[str, float]:
        """Means over the runs, of what was measured."""
        return {key: value for key in _COSTS if (value := self.figure(key)) is not None}


@dataclass(frozen=True)
class Difference:
    """A group minus the baseline, on the same rows."""

    label: str
    measure: Measure
    estimate: Estimate


@dataclass(frozen=True, eq=False)
class Comparison:
    groups: tuple[Group, ...]
    baseline: str  # the label of one of them
    notes: tuple[str, ...]  # what makes them not quite comparable
    rows: int  # held-out rows that all runs share
    measures: tuple[Measure, ...]  # those that every group has
    differences: tuple[Difference, ...]
    settings: tuple[tuple[str, dict[str, Any]], ...]  # key -> label -> value, where they differ

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    @property
    def rewards(self) -> list[str]:
        """Of "training" and "held-out": which rewards all groups have."""
        return [when for when in REWARDS if all(when in group.rewards for group in self.groups)]

    @property
    def main(self) -> Measure | None:
        """The measure that verdicts are about."""
        return self.measures[0] if self.measures else None


def compare(runs: Sequence[Run], baseline: str | None = None) -> Comparison:
    """Compares finished runs. baseline: the label of a group, the first run's if not given.

    Raises AlignzooError for less than two runs, and where there is no such label.
    """
    if len(runs) < 2:
        raise AlignzooError("one run cannot be compared", fix="name two run directories or more")
    names = _shared_rows(runs)
    alike = _grouped(runs)
    labels = _labels(alike)
    groups = tuple(_group(label, of, runs, names) for label, of in zip(labels, alike, strict=True))
    if baseline is not None and baseline not in labels:
        raise AlignzooError(f'no "{baseline}" among what is compared: {", ".join(labels)}', fix="name one of these")
    base = groups[labels.index(baseline) if baseline else 0]
    there = [m for m in MEASURES if all(m.key in group.measured for group in groups)]
    measures = tuple(m for m in there if m.key != "chosen_logp" or all(n.key != "chosen_shift" for n in there))
    differences = tuple(
        Difference(group.label, measure, bootstrap(group.rows(measure.key) - base.rows(measure.key), seed=SEED))
        for measure in measures
        for group in groups
        if group is not base
    )
    notes = (*_notes(runs, len(names)), *_notes_on_seeds(groups), *_notes_on_measures(measures))
    settings = _differing({group.label: group.runs[0].recipe for group in groups})
    return Comparison(groups, base.label, notes, len(names), measures, differences, settings)


# --- groups ----------------------------------------------------------------------------------------------------------


def _grouped(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs whose resolved recipes differ in nothing but the seed and the place, together."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in flat(run.recipe) if key not in _OWN}
        groups.setdefault(repr(sorted(settings.items())), []).append(run)
    return [sorted(of, key=lambda run: run.seed) for of in groups.values()]


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """The loss; with the settings that differ where several groups have the same one, at most three of them."""
    found = []
    for runs in groups:
        loss = runs[0].loss
        same = {str(i): other[0].recipe for i, other in enumerate(groups) if other[0].loss == loss}
        mine = next(i for i, other in same.items() if other is runs[0].recipe)
        words = [f"{key.rpartition('.')[2]} {shown(values[mine])}" for key, values in _differing(same)]
        found.append(f"{loss} ({', '.join(words[:3])})" if words else loss)
    return [label if found.count(label) == 1 else f"{label} {i}" for i, label in enumerate(found, start=1)]


def _group(label: str, of: Sequence[Run], runs: Sequence[Run], names: Sequence[str]) -> Group:
    tables = [sums_of(run, names, start_of(run, runs)) if names else {} for run in of]
    measured: dict[str, list[Values]] = {}
    curves: dict[str, list[Points]] = {}
    for measure in MEASURES:
        by_run = [{step: v for step, s in table.items() if (v := measure.values(s)) is not None} for table in tables]
        if all(by_run):
            measured[measure.key] = [values[max(values)] for values in by_run]
            curves[measure.key] = [(sorted(v), [float(v[s].mean()) for s in sorted(v)]) for v in by_run]
    points = {when: [_points(run, key) for run in of] for when, key in REWARDS.items()}
    rewards = {when: found for when, found in points.items() if all(steps for steps, _ in found)}
    return Group(label, tuple(of), measured, curves, rewards)


def _points(run: Run, key: str) -> Points:
    """A metric of metrics.jsonl over the steps."""
    found = [(record["step"], value) for record in run.records if (value := number(record.get(key))) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _shared_rows(runs: Sequence[Run]) -> list[str]:
    """The names of the rows that all runs have, in the order of the first."""
    if any(run.rows is None for run in runs):
        return []
    shared = set.intersection(*(set(run.rows.names) for run in runs if run.rows is not None))
    return list(dict.fromkeys(name for name in runs[0].rows.names if name in shared)) if runs[0].rows else []


def _differing(recipes: Mapping[str, Mapping[str, Any]]) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Each key whose value is not the same in all recipes, but for seeds and places; None where one lacks it."""
    tables = {label: dict(flat(recipe)) for label, recipe in recipes.items()}
    keys = dict.fromkeys(key for table in tables.values() for key in table if key not in _OWN)
    rows = [(key, {label: table.get(key) for label, table in tables.items()}) for key in keys]
    return tuple((key, row) for key, row in rows if any(v != next(iter(row.values())) for v in row.values()))


def _at(table: Mapping[str, Any], key: str) -> float | None:
    """The finite number under a dotted key."""
    found: Any = table
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return number(found)


# --- what makes runs not comparable ----------------------------------------------------------------------------------


def _notes(runs: Sequence[Run], shared: int) -> Iterator[str]:
    yield from _notes_on_rows(runs, shared)
    facts = {
        "the training data": _hashes("train"),
        "the held-out data": _hashes("eval"),
        "the start model": lambda run: sorted(run.manifest.get("weights", {}).values()),
        "the versions of libraries": lambda run: sorted(run.manifest.get("versions", {}).items()),
    }
    for what, fact in facts.items():
        kinds: dict[str, list[str]] = {}
        for run in runs:
            kinds.setdefault(repr(fact(run)), []).append(run.path.name)
        if len(kinds) > 1:
            sides = " | ".join(", ".join(names) for names in kinds.values())
            yield f"{what} differ: {sides}" if what.endswith("s") else f"{what} is not the same: {sides}"
    lengths: dict[Any, list[str]] = {}
    for run in runs:
        lengths.setdefault(run.summary.get("steps"), []).append(run.path.name)
    if len(lengths) > 1:
        of = "; ".join(f"{steps} steps: {', '.join(names)}" for steps, names in lengths.items())
        yield f"the runs are not equally long (a pair makes two labelled rows; a run may stop early): {of}"
    live = [f"{run.path.name} ({', '.join(run.manifest['live'])})" for run in runs if run.manifest.get("live")]
    if live:
        yield f"given as objects from Python, so that whether they are the same is not known: {'; '.join(live)}"


def _hashes(role: str) -> Any:
    """What the manifest knows of the sources of a role: their hashes, in order."""
    return lambda run: [sha for name, sha in run.manifest.get("data", {}).items() if name.startswith(f"{role}: ")]


def _notes_on_rows(runs: Sequence[Run], shared: int) -> Iterator[str]:
    without = [run.path.name for run in runs if run.rows is None]
    if without:
        yield f"no eval_rows.json, so nothing is compared row by row: {', '.join(without)}"
        return
    counts = {run.path.name: len(set(run.rows.names)) for run in runs if run.rows is not None}
    if any(count != shared for count in counts.values()):
        of = ", ".join(f"{name} {count}" for name, count in counts.items())
        yield f"the held-out rows are not the same: {shared} are shared by all and compared, of {of}"
    if 0 < shared < _FEW:
        yield f"{shared} held-out rows are few: their bootstrap intervals are too narrow"


def _notes_on_seeds(groups: Sequence[Group]) -> Iterator[str]:
    if any(group.seeds != groups[0].seeds for group in groups):
        yield "the seeds are not the same: " + "; ".join(f"{g.label} {', '.join(map(str, g.seeds))}" for g in groups)


def _notes_on_measures(measures: Sequence[Measure]) -> Iterator[str]:
    keys = {measure.key for measure in measures}
    if "chosen_logp" in keys and "chosen_shift" not in keys:
        yield (
            "the log-probs of a start model are not known (eval.at_start = false, and no reference that is it): "
            "nothing is compared with the start"
        )


def last_loss(group: Group) -> tuple[float | None, float | None]:
    """The loss's own held-out value at the first and last evaluation, on its own scale."""
    return group.figure("eval_loss.before"), group.figure("eval_loss.after")
