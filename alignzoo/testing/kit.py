"""What a check is, and how the smallest case that breaks one is found."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from alignzoo.api import Loss
from alignzoo.errors import PluginError
from alignzoo.objective import Objective
from alignzoo.testing import choices
from alignzoo.testing.choices import Settings
from alignzoo.testing.rows import Asked, Case, Rows, draw
from alignzoo.testing.step import How, make_batch_of, prepare, step_of

SIZES = ((1, 1), (1, 3), (2, 2), (3, 5), (5, 7))  # rows, tokens
SHRINKS = 80  # attempts at a smaller case
State = Literal["holds", "fails", "not tested"]
Oracle = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Subject:
    """A loss class under test, and what its author gives beside it."""

    cls: type[Loss]
    reference: Oracle | None = None  # (batch) or (batch, settings) -> the values of the units, term after term
    fixtures: Path | None = None  # JSON: rows and the numbers that they give
    skip: Mapping[str, str] = field(default_factory=dict)  # name of a check: why it is left out

    @cached_property
    def variants(self) -> list[Settings]:
        return choices.variants(self.cls)

    @cached_property
    def _asked(self) -> dict[str, Asked]:
        return {}

    def asked(self, loss: Loss) -> Asked:
        """The columns of data.keep that a loss reads with its settings, found by trying."""
        key = repr(loss.settings)
        if key not in self._asked:
            self._asked[key] = _asked_by(loss)
        return self._asked[key]

    def contract(self, check: Check) -> Verdict:
        """The verdict of the check that all others build on, found once."""
        if not self._found:
            self._found.append(check.run(self))
        return self._found[0]

    @cached_property
    def _found(self) -> list[Verdict]:
        return []

    def rows(self, loss: Loss, case: Case) -> Rows:
        return draw(loss, case, tuple(self.asked(loss)))

    def cases(
        self, *draws: str, sizes: Sequence[tuple[int, int]] = SIZES, seeds: int = 1, other: tuple[int, int] = (4, 5)
    ) -> Iterator[Case]:
        """The defaults in all sizes, for each draw; then every other variant in one."""
        for settings in self.variants[:1]:
            for drawn in draws:
                for rows, tokens in sizes:
                    yield from (Case(settings, drawn, rows, tokens, seed) for seed in range(seeds))
        for settings in self.variants[1:]:
            yield from (Case(settings, drawn, *other) for drawn in draws)


def _asked_by(loss: Loss) -> Asked:
    rows = draw(loss, Case(rows=2))
    asked, how, objective = Asked(2), How(), Objective(loss)
    with suppress(Exception):  # whatever is wrong with it, the checks find it with a place to show
        if loss.has_prepare:
            loss.prepare(replace(step_of(loss, rows, how), extra=asked), loss.init_state())
    with suppress(Exception):
        prepared, _ = prepare(objective, draw(loss, Case(rows=2), tuple(asked)), how, loss.init_state())
        batch = make_batch_of(objective, rows, (0, 1), rows.policy, prepared.of((0, 1)), how)
        loss(replace(batch, extra=asked))
    return asked


@dataclass(frozen=True)
class Verdict:
    """What became of a check."""

    state: State
    what: str = ""  # what is wrong, or why it was not tested
    case: str = ""  # the smallest case found, in words
    rows: tuple[str, ...] = ()  # its values, where they are few


@dataclass(frozen=True)
class Check:
    """One thing that has to hold for a loss."""

    name: str
    holds: str  # what holds, in a few words
    cause: str  # what usually breaks it
    mend: str
    run: Callable[[Subject], Verdict]


Fault = Callable[[Subject, Loss, Case], str]  # what is wrong, "" where nothing is


def for_all(cases: Callable[[Subject], Iterable[Case]], fault: Fault) -> Callable[[Subject], Verdict]:
    """A check of cases from small to large, which stops at the first that fails and makes it smaller."""

    def run(subject: Subject) -> Verdict:
        tried = 0
        for case in cases(subject):
            loss = choices.make(subject.cls, case.settings)
            if loss is None:
                continue
            tried += 1
            what = told(subject, loss, case, fault)
            if what:
                return _smallest(subject, case, what, fault)
        return Verdict("holds") if tried else Verdict("not tested", "there is nothing of it to test")

    return run


def told(subject: Subject, loss: Loss, case: Case, fault: Fault) -> str:
    """The fault of a case; an exception is one, told with the line of the loss's file."""
    try:
        torch.default_generator.manual_seed(0)
        return fault(subject, loss, case)
    except Exception as error:
        return raised(error)


def raised(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    outside = [f for f in frames if not f.filename.startswith((_OWN, str(Path(torch.__file__).parent)))]
    place = f" ({outside[-1].filename}:{outside[-1].lineno})" if outside else ""
    what = error.what if isinstance(error, PluginError) else " ".join(str(error).split())
    return f"raised {type(error).__name__}: {what}{place}"


_OWN = str(Path(__file__).resolve().parents[1])


def _smallest(subject: Subject, case: Case, what: str, fault: Fault) -> Verdict:
    attempts, seen = 0, {repr(case)}
    while True:
        for smaller in _smaller(subject, case):
            loss = choices.make(subject.cls, smaller.settings)
            if loss is None or repr(smaller) in seen:
                continue
            seen.add(repr(smaller))
            attempts += 1
            found = told(subject, loss, smaller, fault) if attempts <= SHRINKS else ""
            if found:
                case, what = smaller, found
                break
        else:
            return Verdict("fails", what, case.words(), tuple(_values(subject, case)))


def _values(subject: Subject, case: Case) -> list[str]:
    loss = choices.make(subject.cls, case.settings)
    return [] if loss is None else subject.rows(loss, case).words()


def _smaller(subject: Subject, case: Case) -> Iterator[Case]:
    """Cases with less in them: settings by default, fewer rows, shorter completions."""
    given = {name for name, _ in subject.variants[0]}
    for name, _ in case.settings:
        if name not in given:
            yield replace(case, settings=tuple(s for s in case.settings if s[0] != name))
    for rows in sorted({1, 2, case.rows // 2, case.rows - 1} - {0}):
        if rows < case.rows:
            yield replace(case, rows=rows)
            if case.draw == "far":  # what is far differs from row to row
                yield from (replace(case, rows=rows, seed=case.seed + i) for i in range(1, case.rows))
    for tokens in sorted({1, 2, case.tokens // 2, case.tokens - 1} - {0}):
        if tokens < case.tokens:
            yield replace(case, tokens=tokens)
    if case.seed and case.draw != "far":
        yield replace(case, seed=0)
