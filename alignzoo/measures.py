"""Held-out measures that mean the same for every loss, row by row, from eval_rows.json. It imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from alignzoo.evalrows import EvalRows
from alignzoo.readrun import Run
from alignzoo.records import TIE

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Sums:
    """Log-probs of one evaluation, R rows of K completions: (chosen, rejected), or one that is to be learned."""

    policy: Values  # (R, K) nats
    tokens: Values  # (R, K)
    start: Values | None  # (R, K) nats, of the start model; None where nobody knows them

    @property
    def shift(self) -> Values:
        """Change since the start, (R, K), nats. The log-ratio to a reference that is the start model."""
        assert self.start is not None
        return self.policy - self.start


@dataclass(frozen=True)
class Measure:
    """A number for each row."""

    key: str
    title: str
    unit: str
    meaning: str
    of: Callable[[Sums], Values]  # (R,)
    pairs: bool = True  # needs both sides of a pair
    start: bool = True  # needs the start model's log-probs
    share: bool = False  # its mean is a share of the rows, 0 to 1

    def values(self, sums: Sums) -> Values | None:
        """(R,), or None where the rows are no pairs or the start model's log-probs are not known."""
        if (self.pairs and sums.policy.shape[1] != 2) or (self.start and sums.start is None):
            return None
        return self.of(sums)


def _lead(of: Values) -> Values:
    return of[:, 0] - of[:, 1]


def _right(lead: Values) -> Values:
    return np.where(np.abs(lead) <= TIE, 0.5, (lead > 0).astype(np.float64))


MEASURES = (
    Measure(
        "accuracy", "accuracy", "share of pairs",
        "the log-ratio to the start model, which is DPO's implicit reward without its beta, is higher for the chosen "
        "answer; a tie counts one half",
        lambda s: _right(_lead(s.shift)), share=True,
    ),
    Measure(
        "margin", "margin", "nats", "chosen minus rejected log-ratio to the start model",
        lambda s: _lead(s.shift),
    ),
    Measure(
        "mean_logp_accuracy", "accuracy by log-prob per token", "share of pairs",
        "the policy gives the chosen answer the higher log-prob per token",
        lambda s: _right(_lead(s.policy / s.tokens)), start=False, share=True,
    ),
    Measure(
        "logp_accuracy", "accuracy by log-prob", "share of pairs",
        "the policy gives the whole chosen answer the higher log-prob; longer answers have lower ones",
        lambda s: _right(_lead(s.policy)), start=False, share=True,
    ),
    Measure(
        "chosen_shift", "chosen log-prob, change", "nats per token",
        "change of the chosen (or only) answer's log-prob per token since the start; below 0 it became less probable",
        lambda s: s.shift[:, 0] / s.tokens[:, 0], pairs=False,
    ),
    Measure(
        "rejected_shift", "rejected log-prob, change", "nats per token",
        "change of the rejected answer's log-prob per token since the start",
        lambda s: s.shift[:, 1] / s.tokens[:, 1],
    ),
    Measure(
        "chosen_logp", "chosen log-prob", "nats per token", "log-prob per token of the chosen (or only) answer",
        lambda s: s.policy[:, 0] / s.tokens[:, 0], pairs=False, start=False,
    ),
)  # fmt: skip


def start_of(run: Run, runs: Sequence[Run]) -> tuple[EvalRows, Values] | None:
    """Rows and (R, K) log-probs of the run's start model: of its evaluation before the first step, or its reference's
    where that is the start model, or those that another run with the same start model has."""
    own = _own_start(run)
    if own is not None:
        return own
    alike = (other for other in runs if other is not run and _weights(other) and _weights(other) == _weights(run))
    return next((found for other in alike if (found := _own_start(other)) is not None), None)


def _own_start(run: Run) -> tuple[EvalRows, Values] | None:
    if run.rows is None:
        return None
    if 0 in run.rows.policy:
        return run.rows, run.rows.policy[0]
    settings = run.recipe.get("reference", {})
    moved = "path" in settings or "sync_every_steps" in settings
    return None if run.rows.reference is None or moved else (run.rows, run.rows.reference)


def _weights(run: Run) -> dict[str, str]:
    return dict(run.manifest.get("weights", {}))


def sums_of(run: Run, names: Sequence[str], start: tuple[EvalRows, Values] | None) -> dict[int, Sums]:
    """The rows with these names at each evaluation, by its step."""
    assert run.rows is not None
    index = _index(run.rows, names)
    first = None
    if start is not None and set(names) <= set(start[0].names):
        first = start[1][_index(start[0], names)]
    tokens = run.rows.tokens[index]
    return {step: Sums(table[index], tokens, first) for step, table in run.rows.policy.items()}


def _index(rows: EvalRows, names: Sequence[str]) -> list[int]:
    places = {name: i for i, name in enumerate(rows.names)}
    return [places[name] for name in names]
