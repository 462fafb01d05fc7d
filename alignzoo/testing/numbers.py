"""Checks of the numbers themselves: gradients, extremes, steps in which nothing counts, the direction of a step."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.overrides import TorchFunctionMode

from alignzoo.api import Loss
from alignzoo.objective import Objective
from alignzoo.testing.kit import Check, Subject, Verdict, for_all
from alignzoo.testing.rows import Case, Rows
from alignzoo.testing.step import How, Outcome, make_batch_of, prepare, run

DTYPES = (torch.float32, torch.bfloat16)
ALWAYS = ("plain", "near", "equal")
STARTS = ("behind by 100", "behind by 10", "behind by 1")
FORGETS = "forgets"


# --- it runs ---------------------------------------------------------------------------------------------------------


def _runs(subject: Subject, loss: Loss, case: Case) -> str:
    run(loss, subject.rows(loss, case), How(dtype=torch.float32))
    return ""


def _draws_of(subject: Subject) -> tuple[str, ...]:
    kinds = {
        "groups": ("nothing counts", "equal rewards", "first step"),
        "labelled": ("good rows only", "bad rows only"),
    }
    return kinds.get(subject.cls.data, ())


RUNS = Check(
    "contract",
    "its output fits the contract, for one row and for odd sizes",
    "a wrong shape, a mean over the batch, metrics or rewards that are not detached, a name of alignzoo's own metrics",
    "see docs/plugins.md: what a loss gives back",
    for_all(lambda s: s.cases(*ALWAYS, *_draws_of(s)), _runs),
)


# --- gradients -------------------------------------------------------------------------------------------------------


class _Held(TorchFunctionMode):
    """Holds what a loss takes out of the graph (detach, no_grad, comparisons) at its first values.

    The gradient of a loss with such parts is that of the function in which they are constants; finite differences of
    the loss as it stands are not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.at = True, 0
        self.kept: dict[int, Any] = {}

    def again(self) -> None:
        self.first, self.at = False, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        at, self.at = self.at, self.at + 1
        result = func(*args, **(kwargs or {}))
        if not self.first:
            return self.kept.get(at, result)
        if any(_has_gradient(a) for a in args) and not _has_gradient(result) and not _is_shape(result):
            self.kept[at] = result.clone() if isinstance(result, Tensor) else result
        return result


def _has_gradient(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    return isinstance(value, list | tuple) and any(_has_gradient(v) for v in value)


def _is_shape(value: Any) -> bool:
    return not isinstance(value, Tensor | float | bool)


def _gradient(subject: Subject, loss: Loss, case: Case) -> str:
    rows, how, objective = subject.rows(loss, case), How(), Objective(loss)
    prepared = prepare(objective, rows, how, loss.init_state())[0].of(range(case.rows))

    def values(policy: Tensor) -> tuple[Tensor, ...]:
        """The values of the units of each term that depends on the policy."""
        output = objective(make_batch_of(objective, rows, range(case.rows), policy, prepared, how))
        terms = (t.loss if t.mask is None else t.loss.masked_fill(~t.mask, 0.0) for t in output.terms)
        return tuple(t for t in terms if t.requires_grad)

    if not values(rows.policy.clone().requires_grad_()):
        return "no term of it has a gradient"
    try:
        _gradcheck(values, rows.policy)
    except GradcheckError as plain:
        held, first = _Held(), " ".join(str(plain).split())

        def as_constants(policy: Tensor) -> tuple[Tensor, ...]:
            with held:
                found = values(policy)
            held.again()
            return found

        try:
            _gradcheck(as_constants, rows.policy)
        except GradcheckError:
            return first
    return ""


def _gradcheck(values: Callable[[Tensor], tuple[Tensor, ...]], policy: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gradcheck(values, policy.clone().requires_grad_(), atol=1e-6, rtol=1e-4, check_undefined_grad=False)


def _smooth(subject: Subject) -> Iterable[Case]:
    yield from subject.cases("plain", "near", sizes=((1, 1), (2, 3)), other=(2, 3))


GRADIENT = Check(
    "gradient",
    "gradients equal finite differences in float64",
    "a cast to float32 inside of the loss, a backward of its own, numbers that leave torch on the way",
    "do not cast; what shall be constant goes through .detach(), which this check allows for",
    for_all(_smooth, _gradient),
)


# --- finite ----------------------------------------------------------------------------------------------------------


def _finite(subject: Subject, loss: Loss, case: Case) -> str:
    rows = subject.rows(loss, case)
    return next(filter(None, (not_finite(run(loss, rows, How(dtype=dtype)), dtype) for dtype in DTYPES)), "")


def not_finite(outcome: Outcome, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if not torch.isfinite(outcome.loss):
        return f"the loss is {outcome.loss.item()} in {name}"
    if not torch.isfinite(outcome.gradient).all():
        worst = outcome.gradient[~torch.isfinite(outcome.gradient)][0].item()
        return f"a gradient is {worst} in {name}, though the loss is {outcome.loss.item():.4g}"
    return ""


def _extremes(subject: Subject) -> Iterable[Case]:
    yield from subject.cases("zero", "certain", "equal", "behind by 100", "ahead by 100", sizes=((1, 1), (2, 3)))
    for settings in subject.variants:
        yield Case(settings, "far", 16 if subject.cls.data == "pairs" else 4, 400)


FINITE = Check(
    "finite",
    "finite for extreme log-probs, in float32 and bfloat16",
    "log(1 - exp(x)), exp of a sum, a division by a difference, a square root at 0, log(sigmoid(x))",
    "stay in log space (logsigmoid, log1p, expm1, logsumexp), clamp before exp; inside of torch.where too, since its "
    "gradient goes through both sides",
    for_all(_extremes, _finite),
)


def _empty(subject: Subject, loss: Loss, case: Case) -> str:
    outcome = run(loss, subject.rows(loss, case), How(dtype=torch.float32))
    nan = [name for name, value in outcome.metrics.items() if value != value]
    return not_finite(outcome, torch.float32) or (f"the metric {nan[0]} is NaN" if nan else "")


def _nothing_counts(subject: Subject) -> Iterable[Case]:
    of_kind = {"labelled": ("good rows only", "bad rows only"), "groups": ("nothing counts", "equal rewards")}
    return subject.cases(*of_kind.get(subject.cls.data, ("plain",)), sizes=((1, 1), (2, 3)))


EMPTY = Check(
    "empty",
    "finite where a term has nothing that counts: one label only, no rewards, equal rewards, all truncated",
    "a mean over no rows, a division by a standard deviation of 0, a maximum of nothing, NaN rewards that are read",
    "leave the division to the engine; add a small number to a deviation; mask with torch.where before the arithmetic",
    for_all(_nothing_counts, _empty),
)


# --- direction -------------------------------------------------------------------------------------------------------


def _signs(loss: Loss, rows: Rows) -> Tensor:
    """(M,) 1 at the tokens that a step shall make more likely, -1 at those to make less likely, or between."""

    def sign(tree: Any, slot: int, _: Any) -> float:
        if slot >= len(tree.completions):
            return 0.0  # mismatched
        if loss.data == "labelled":
            return 1.0 if tree.label else -1.0
        if loss.data == "groups":
            return float(tree.rewards[slot] - sum(tree.rewards) / len(tree.rewards))
        return 1.0 - 2.0 * slot

    return rows.table(sign) * (-1.0 if FORGETS in loss.invariances else 1.0)


_LOGGED = {"pairs": "rewards/margins", "labelled": "rewards/margins", "demonstrations": "rewards/completion"}


def _direction(subject: Subject, loss: Loss, case: Case) -> str:
    """A step is right where it moves the log-probs, and the rewards of the loss if there are any, the right way."""
    kind = subject.cls.data
    starts = STARTS if kind in ("pairs", "labelled") else ("equal", "near", "plain")
    found = [fault for start in starts if (fault := _step(loss, subject.rows(loss, replace(case, draw=start)))) != "-"]
    wrong = [fault for fault in found if fault]
    if not found:
        return f"no gradient moves anything, from {', '.join(starts)}"
    return wrong[0] if 2 * len(wrong) >= len(found) else ""


def _step(loss: Loss, rows: Rows) -> str:
    """What went the wrong way, "" where nothing did, "-" where nothing moved."""
    before = run(loss, rows)
    size = before.gradient.abs().max()
    if not size:
        return "-"
    moved = replace(rows, policy=rows.policy - 1e-3 / size * before.gradient)
    gain = float(((moved.policy - rows.policy) * _signs(loss, rows)).sum())
    what = {"pairs": "the margin of chosen over rejected", "demonstrations": "the log-prob of the completions"}
    if gain <= 0:
        of = what.get(loss.data, "the log-prob of good rows over bad ones")
        return f"after a gradient step {of} changes by {gain:.3g} nats"
    name = _LOGGED.get(loss.data, "")
    if name in before.metrics and FORGETS not in loss.invariances:
        change = run(loss, moved).metrics[name] - before.metrics[name]
        if change < 0:
            return f"after a gradient step {name} falls by {-change:.3g}"
    return ""


def _starts(subject: Subject) -> Iterable[Case]:
    """Of words and flags all; numbers by default, since any direction may be asked for with some."""
    given = {name for name, _ in subject.variants[0]}
    for settings in subject.variants:
        if all(isinstance(value, bool | str) or name in given for name, value in settings):
            yield from (Case(settings, STARTS[0], 4, 3, seed) for seed in range(2))


DIRECTION = Check(
    "direction",
    "a gradient step makes chosen (good, demonstrated) completions more likely than the others",
    "a sign, chosen and rejected swapped, rewards of the other side",
    f'turn the sign; a loss that is to unlearn declares invariances = frozenset({{"{FORGETS}"}})',
    for_all(_starts, _direction),
)


# --- oracles ---------------------------------------------------------------------------------------------------------


def _by_reference(subject: Subject, loss: Loss, case: Case) -> str:
    assert subject.reference is not None
    outcome = run(loss, subject.rows(loss, case))
    wanted = [outcome.batches[0], loss.settings][: len(inspect.signature(subject.reference).parameters)]
    given = subject.reference(*wanted)
    given = given if isinstance(given, Mapping) else {"values": given}
    expected, found = [float(v) for v in given["values"]], outcome.values()
    if len(found) != len(expected):
        return f"it has {len(found)} units and the reference gives {len(expected)} numbers"
    far = [i for i, (f, e) in enumerate(zip(found, expected, strict=True)) if not abs(f - e) <= 1e-7 + 1e-5 * abs(e)]
    if far:
        return f"unit {far[0]} is {found[far[0]]:.9g} and the reference gives {expected[far[0]]:.9g}"
    for name, value in given.get("metrics", {}).items():
        logged = outcome.metrics.get(name, math.nan)
        if not abs(logged - value) <= 1e-6 + 1e-5 * abs(value):
            return f"the metric {name} is {logged:.9g} and the reference gives {value:.9g}"
    return ""


def _oracle(subject: Subject) -> Verdict:
    if subject.reference is None:
        return Verdict("not tested", "no reference was given")
    one = len(inspect.signature(subject.reference).parameters) == 1  # it knows no settings: the defaults only

    def cases(subject: Subject) -> Iterable[Case]:
        found = subject.cases("plain", "near", "equal", sizes=((1, 1), (2, 3), (5, 6)), seeds=2)
        return (c for c in found if not one or c.settings == subject.variants[0])

    return for_all(cases, _by_reference)(subject)


ORACLE = Check(
    "reference function",
    "its values are those of the author's reference function",
    "one of the two reads the equation wrongly",
    "work the smallest case by hand",
    _oracle,
)
