"""Checks of what a loss declares: its reference, what else it asks for, its settings and their bounds, its metrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace

import torch

from alignzoo.api import Loss
from alignzoo.testing import choices
from alignzoo.testing.choices import Field, Settings
from alignzoo.testing.kit import Check, Subject, Verdict, for_all
from alignzoo.testing.numbers import not_finite
from alignzoo.testing.rows import Case, Rows
from alignzoo.testing.step import How, Outcome, compare, run

STEPS = 3  # in a row, for what works through the state
EXACT = 1e-9  # what differs by more is no rounding of float64
_METRIC = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")


def _everywhere(subject: Subject) -> list[Case]:
    """Rows of all sorts, on which what has an effect should show one. The common ones first."""
    draws = [
        ("plain", 5, 7, 0), ("plain", 4, 3, 1), ("near", 4, 5, 2), ("behind by 10", 4, 5, 0), ("ahead by 10", 4, 5, 0),
        ("behind by 1", 4, 5, 0), ("ahead by 1", 4, 5, 0), ("behind by 100", 4, 5, 0), ("ahead by 100", 4, 5, 0),
        ("equal", 3, 3, 0), ("zero", 2, 3, 0), ("plain", 8, 40, 3), ("far", 16, 8, 0), ("certain", 2, 3, 0),
    ]  # fmt: skip
    of_kind = {"groups": ("nothing counts", "equal rewards", "first step"), "labelled": ("good rows only",)}
    return [Case((), *d) for d in [*draws, *((name, 4, 5, 0) for name in of_kind.get(subject.cls.data, ()))]]


# --- what it asks for ------------------------------------------------------------------------------------------------


def _without_reference(subject: Subject, loss: Loss, case: Case) -> str:
    if loss.needs_reference:
        return ""
    rows = subject.rows(loss, case)
    found = compare(run(loss, rows), run(loss, rows, How(reference=True)), metrics=False)
    return f"it declares that it needs no reference and changes with one: {found}" if found else ""


def _moved_reference(rows: Rows) -> Rows:
    return replace(rows, reference=rows.reference * 0.75 - 0.125)


def _moves(subject: Subject, settings: Settings, change: Callable[[Rows], Rows], *, metrics: bool) -> bool:
    """Does the loss change with the rows, for these settings, anywhere?"""
    loss = choices.make(subject.cls, settings)
    if loss is None:
        return False
    for case in _everywhere(subject):
        rows = subject.rows(loss, case)
        if compare(run(loss, rows), run(loss, change(rows)), metrics=metrics, state=False, rtol=EXACT):
            return True
    return False


def _reference(subject: Subject) -> Verdict:
    """Without: the same whether there is one or not. With: the loss changes with it, for any settings of a property."""
    verdict = for_all(lambda s: s.cases("plain", "near", sizes=((1, 1), (3, 5))), _without_reference)(subject)
    if verdict.state == "fails":
        return verdict
    needing = [s for s in subject.variants if _needs(subject, s)]
    idle = [s for s in needing if not _moves(subject, s, _moved_reference, metrics=False)]
    if idle and (len(idle) == len(needing) or isinstance(vars(subject.cls)["needs_reference"], property)):
        words = Case(idle[0]).words().split("settings: ")[1]
        return Verdict("fails", f"it declares that it needs a reference and its loss does not change with it ({words})")
    return Verdict("holds", "needed" if needing else "not needed")


def _needs(subject: Subject, settings: Settings) -> bool:
    loss = choices.make(subject.cls, settings)
    return loss is not None and bool(loss.needs_reference)


REFERENCE = Check(
    "reference",
    "needs_reference is true: the loss changes with the reference, or not at all",
    "sum() or mean() where log_ratio() was meant; a term of weight 0 for which a property says True",
    "use log_ratio(), or declare needs_reference = False (or a property of the settings): a reference costs a model",
    _reference,
)


def _asks(subject: Subject) -> Verdict:
    """token_stats, needs_mismatched and columns: what is computed or kept for the loss is read by it."""
    columns = _columns(subject)
    if columns.state == "fails":
        return columns
    asked: dict[str, Callable[[Rows], Rows]] = {name: _moved_stat(name) for name in sorted(subject.cls.token_stats)}
    if any(loss.needs_mismatched for s in subject.variants if (loss := choices.make(subject.cls, s))):
        asked["needs_mismatched"] = _moved_mismatched
    for name, change in asked.items():
        if not any(_moves(subject, settings, change, metrics=True) for settings in subject.variants):
            return Verdict("fails", f"it asks for {name}, and neither its loss nor its metrics change with it")
    found = ", ".join([*asked, *([columns.what] if columns.what else [])])
    return Verdict("holds", found) if found else Verdict("not tested", "it asks for nothing more")


def _columns(subject: Subject) -> Verdict:
    """Each declared column is read, and each that it cannot do without is declared, so that it is asked for in time."""
    read = set[str]()
    for settings in subject.variants:
        loss = choices.make(subject.cls, settings)
        if loss is None:
            continue
        wants, asked = set(loss.columns), subject.asked(loss)
        reads = set(asked)
        words = Case(settings).words().split("settings: ")[1]
        if idle := sorted(map(str, wants - reads)):
            return Verdict("fails", f"it declares the columns {', '.join(idle)} and does not read them ({words})")
        if hidden := sorted(reads - wants - asked.optional):
            return Verdict("fails", f"it reads the columns {', '.join(hidden)} and does not declare them ({words})")
        read |= reads
    return Verdict("holds", f"columns {', '.join(sorted(read))}" if read else "")


def _moved_stat(name: str) -> Callable[[Rows], Rows]:
    def change(rows: Rows) -> Rows:
        values = rows.stats[name]
        return replace(rows, stats={**rows.stats, name: ~values if values.dtype == torch.bool else values * 0.5})

    return change


def _moved_mismatched(rows: Rows) -> Rows:
    other = rows.table(lambda tree, slot, _: float(slot == len(tree.completions)))
    return replace(rows, policy=rows.policy - 0.5 * other, reference=rows.reference - 0.125 * other)


ASKS = Check(
    "requests",
    "token_stats, needs_mismatched and columns are read, and no other columns",
    "a declaration that was left behind; a column of batch.extra that is not declared",
    "take out what is not read: it costs time in every step; declare what is read: columns = (...)",
    _asks,
)


# --- settings --------------------------------------------------------------------------------------------------------


def _settings(subject: Subject) -> Verdict:
    fields = choices.fields_of(subject.cls)
    single = [f.name for f in fields if len(choices.values(subject.cls, f)) < 2]
    found = {f.name: _matters(subject, f) for f in fields if f.name not in single}
    idle, bound = ([name for name, matters in found.items() if matters is answer] for answer in (False, None))
    if idle:
        tried = "; ".join(f"{f.name}: {_values_in_words(subject, f)}" for f in fields if f.name in idle)
        return Verdict("fails", f"no effect on loss, gradient, metrics or state of {', '.join(idle)} (tried {tried})")
    if not fields:
        return Verdict("not tested", "it has no settings")
    notes = [", ".join(name for name, matters in found.items() if matters)] if any(found.values()) else []
    notes += [f"changed together with others only: {', '.join(bound)}"] if bound else []
    notes += [f"no second value is known for {', '.join(single)}"] if single else []
    refused = choices.refused(subject.cls, subject.variants)
    notes += [f"refused and so not tried: {', '.join(refused)}"] if refused else []
    return Verdict("holds", "; ".join(notes))


def _values_in_words(subject: Subject, field: Field) -> str:
    return ", ".join(map(repr, choices.values(subject.cls, field)[:6]))


def _matters(subject: Subject, field: Field) -> bool | None:
    """Do two values of a setting ever give different steps? None where the loss takes no two beside the same others."""
    values, bases = choices.values(subject.cls, field), list[Settings]()
    for settings in subject.variants:
        base = tuple((name, value) for name, value in settings if name != field.name)
        if base not in bases:
            bases.append(base)
    tried = []
    for i, base in enumerate(bases):
        some = values if i == 0 else values[:4]
        made = (choices.make(subject.cls, choices.changed(base, field.name, value)) for value in some)
        tried.append([loss for loss in made if loss is not None])
    if all(len(losses) < 2 for losses in tried):
        return None
    return any(_differ(subject, losses, case) for case in _everywhere(subject) for losses in tried)


def _differ(subject: Subject, losses: list[Loss], case: Case) -> bool:
    found = []
    for loss in losses:
        with suppress(Exception):  # values that break the loss are the business of the check of bounds
            found.append(_steps(subject, loss, case))
    return any(compare(a, b, rtol=EXACT) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def _steps(subject: Subject, loss: Loss, case: Case) -> list[Outcome]:
    """Some steps one after the other; one where there is no state."""
    state, found = loss.init_state(), list[Outcome]()
    for i in range(STEPS if type(loss).init_state is not Loss.init_state else 1):
        found.append(run(loss, subject.rows(loss, replace(case, seed=case.seed + i)), state=state))
        state = found[-1].state
    return found


SETTINGS = Check(
    "settings",
    "each setting changes the loss or its metrics somewhere",
    "a setting that was declared and never read, or read under another's name",
    "use it, or take it out",
    _settings,
)


def _bounds(subject: Subject) -> Verdict:
    for field in choices.fields_of(subject.cls):
        for value in choices.beyond(subject.cls, field):
            settings = choices.changed(subject.variants[0], field.name, value)
            if choices.make(subject.cls, settings) is not None:
                return Verdict("fails", f"{field.name} = {value!r} is out of its bounds and was taken")
    return for_all(_edge_cases, _finite_at_the_edge)(subject)


def _edge_cases(subject: Subject) -> Iterable[Case]:
    for field in choices.fields_of(subject.cls):
        for value in choices.edges(subject.cls, field):
            settings = choices.changed(subject.variants[0], field.name, value)
            yield from (Case(settings, draw, 3, 4) for draw in ("plain", "near", "equal"))


def _finite_at_the_edge(subject: Subject, loss: Loss, case: Case) -> str:
    return not_finite(run(loss, subject.rows(loss, case), How(dtype=torch.float32)), torch.float32)


BOUNDS = Check(
    "bounds",
    "settings out of bounds are refused, those at the bounds give finite numbers",
    "a missing bound, most often gt=0 of what is divided by; ge=0 where gt=0 is meant; an __init__ of its own",
    "declare the bound: alignzoo.setting(0.1, help, gt=0)",
    _bounds,
)


# --- metrics ---------------------------------------------------------------------------------------------------------


def _metrics(subject: Subject, loss: Loss, case: Case) -> str:
    outcome = run(loss, subject.rows(loss, case), How(dtype=torch.float32))
    for name, value in outcome.metrics.items():
        if value != value:
            return f"the metric {name} is NaN"
    for name in (name for output in outcome.outputs for name in output.metrics):
        if not _METRIC.fullmatch(name):
            return f'"{name}" is no name of a metric (letters, digits, _ . - and /)'
    return ""


METRICS = Check(
    "metrics",
    "no metric is NaN, and their names suit the trackers",
    "a mean over nothing (metric(values, where=mask) leaves it out), 0/0, NaN rewards",
    "give values per row with where=",
    for_all(lambda s: s.cases("plain", "equal", "zero", "certain", "far", sizes=((1, 1), (3, 5))), _metrics),
)
