"""All checks on a loss: as results, and as a pytest test. And a batch to feed a loss by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from alignzoo.api import KINDS, Batch, Loss, LossOutput, NoSettings
from alignzoo.declared import check_loss_class
from alignzoo.errors import PluginError
from alignzoo.objective import Objective
from alignzoo.schema import nearest
from alignzoo.testing import changes, declared, numbers
from alignzoo.testing.fixtures import FIXTURES, check_fixtures
from alignzoo.testing.kit import Check, Oracle, Subject, Verdict, raised
from alignzoo.testing.rows import DRAWS, Case, draw
from alignzoo.testing.step import How, make_batch_of, prepare

CHECKS: dict[str, Check] = {
    check.name: check
    for check in (
        numbers.RUNS, numbers.GRADIENT, numbers.FINITE, numbers.EMPTY,
        changes.ORDER, changes.PADDING, changes.PARTS, changes.UNITS, changes.DECLARED_INVARIANCES,
        declared.REFERENCE, declared.ASKS, declared.SETTINGS, declared.BOUNDS, declared.METRICS,
        changes.DETERMINISTIC, changes.STATELESS, changes.INPUTS,
        numbers.DIRECTION, numbers.ORACLE, FIXTURES,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What became of one check on one loss."""

    loss: str
    check: Check
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        return {"loss": self.loss, "check": self.check.name, "holds": self.check.holds, **asdict(self.verdict)}

    def message(self) -> str:
        """A failure in full: what, the smallest case, what usually causes it and how to mend it."""
        lines = [f'loss "{self.loss}", {self.check.name}: {self.verdict.what}']
        if self.verdict.case:
            lines.append(f"  smallest case: {self.verdict.case}")
        lines += [f"    {line}" for line in self.verdict.rows]
        return "\n".join([*lines, f"  usual cause: {self.check.cause}", f"  way out: {self.check.mend}"])


def examine(
    cls: type[Loss],
    *,
    reference: Oracle | None = None,
    fixtures: str | Path | None = None,
    skip: Mapping[str, str] | None = None,
) -> list[Result]:
    """Every check on a loss class.

    Raises PluginError for a class that breaks the contract, or a misspelt `skip`; DataError for fixtures that are none.

    reference: a function of a batch, or of a batch and the settings: the values of the units, term after term; or
        {"values": these, "metrics": {name: mean over the batch}}
    fixtures: a JSON file of cases with known results, see docs/conformance.md
    skip: names of checks, each with the reason why it is left out
    """
    subject = subject_of(cls, reference, fixtures, skip)
    return [Result(cls.name, check, verdict_of(check, subject)) for check in CHECKS.values()]


def subject_of(
    cls: type[Loss],
    reference: Oracle | None = None,
    fixtures: str | Path | None = None,
    skip: Mapping[str, str] | None = None,
) -> Subject:
    """What the checks run on. Raises PluginError and DataError as `examine` does."""
    check_loss_class(cls)
    for name in skip or {}:
        if name not in CHECKS:
            raise PluginError(f'there is no check "{name}"{nearest(name, CHECKS)}', why=f"they are {', '.join(CHECKS)}")
    if fixtures is not None:
        check_fixtures(cls, Path(fixtures))
    return Subject(cls, reference, None if fixtures is None else Path(fixtures), skip or {})


def verdict_of(check: Check, subject: Subject) -> Verdict:
    """The verdict of a check. A loss that does not run at all fails the first one only."""
    if check.name in subject.skip:
        return Verdict("not tested", f"left out: {subject.skip[check.name]}")
    if not subject.variants:
        return Verdict("fails", f'no settings were found that "{subject.cls.name}" takes')
    if check is not numbers.RUNS and subject.contract(numbers.RUNS).state == "fails":
        return Verdict("not tested", f'"{numbers.RUNS.name}" fails')
    if check is numbers.RUNS:
        return subject.contract(check)
    with torch.random.fork_rng(devices=()):
        try:
            return check.run(subject)
        except Exception as error:
            return Verdict("fails", raised(error))


def conformance(
    cls: type[Loss],
    *,
    reference: Oracle | None = None,
    fixtures: str | Path | None = None,
    skip: Mapping[str, str] | None = None,
) -> Callable[[str], None]:
    """A pytest test of a loss class with an id for each check; arguments as for `examine`.

    test_my_loss = conformance(MyLoss)
    """
    import pytest

    subject = subject_of(cls, reference, fixtures, skip)

    @pytest.mark.parametrize("check", CHECKS)
    def test(check: str) -> None:
        verdict = verdict_of(CHECKS[check], subject)
        if verdict.state == "fails":
            pytest.fail(Result(cls.name, CHECKS[check], verdict).message(), pytrace=False)
        if verdict.state == "not tested":
            pytest.skip(verdict.what)

    return test


# --- a batch by hand -------------------------------------------------------------------------------------------------


def make_batch(
    loss: Loss | str,
    *,
    rows: int = 4,
    tokens: int = 6,
    draw_as: str = "plain",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    columns: tuple[str, ...] = (),
) -> Any:
    """A batch of made-up log-probs, or of scores for a loss that needs them; they ask for gradients.

    loss: a loss, whose `prepare` is then called, or a kind of data, which gets a reference
    draw_as: which log-probs, see docs/conformance.md
    columns: numeric columns of data.keep in `extra`
    """
    if isinstance(loss, str):
        if loss not in KINDS:
            raise PluginError(f'there is no kind of data "{loss}"{nearest(loss, KINDS)}')
        loss = _of_kind(loss)
    if draw_as not in DRAWS:
        raise PluginError(f'draw_as = "{draw_as}" is not known{nearest(draw_as, DRAWS)}', why=", ".join(DRAWS))
    made, how, objective = draw(loss, Case((), draw_as, rows, tokens, seed), columns), How(dtype), Objective(loss)
    prepared, _ = prepare(objective, made, how, loss.init_state())
    policy = made.policy.detach().to(dtype).requires_grad_()
    return make_batch_of(objective, made, range(rows), policy, prepared.of(range(rows)), how)


def _of_kind(kind: str) -> Loss:
    class Any_(Loss):
        name, data, needs_reference = "any", kind, True
        Settings = NoSettings

        def __call__(self, batch: Batch) -> LossOutput:
            raise NotImplementedError

    return Any_()
