"""Checks that run a loss twice: what must change nothing, and what must not be changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignzoo.api import INVARIANCES, Loss
from alignzoo.objective import Objective, count_units
from alignzoo.testing.kit import Check, Subject, Verdict, for_all
from alignzoo.testing.rows import Case, Rows
from alignzoo.testing.step import MADE_UP, How, compare, make_batch_of, prepare, run, step_of, terms_of, with_policy

MANY = ((2, 2), (3, 5), (5, 7))


def _changed(what: str, difference: str) -> str:
    return f"{what}: {difference}" if difference else ""


# --- order, padding, micro-batches -----------------------------------------------------------------------------------


def _order(subject: Subject, loss: Loss, case: Case) -> str:
    rows = subject.rows(loss, case)
    first, turned = run(loss, rows), list(range(case.rows))[::-1]
    mixed = Random(case.seed).sample(turned, case.rows)
    return next(
        filter(None, (_changed(f"rows {order}", compare(first, run(loss, rows.ordered(order))))
                      for order in (turned, mixed))), "",
    )  # fmt: skip


def _of_kind(subject: Subject) -> tuple[str, ...]:
    return ("nothing counts", "first step") if subject.cls.data == "groups" else ()


ORDER = Check(
    "order",
    "the order of the examples changes nothing",
    "rows compared with their neighbours (torch.roll), an index into the batch, a first or last row treated apart",
    "compute what needs other rows in prepare, symmetric in them",
    for_all(lambda s: s.cases("plain", "near", *_of_kind(s), sizes=MANY), _order),
)


def _padding(subject: Subject, loss: Loss, case: Case) -> str:
    rows = subject.rows(loss, case)
    first = run(loss, rows)
    for value, columns in ((0.0, 3), (1e4, 0), (-20.0, 2)):
        changed = run(loss, rows, How(padding=value, wider=columns))
        fault = _changed(f"padding of {value:g}, {columns} columns more", compare(first, changed))
        if fault:
            return fault
    return ""


PADDING = Check(
    "padding",
    "length and value of the padding change nothing, nor do tokens that do not count",
    "a sum over the table without its mask, a count of values that are not 0, shape[1] for a length, exp of padding",
    "sum(), mean() and log_ratio() use the mask; lengths counts it; masked_fill before other sums, and before exp",
    for_all(lambda s: s.cases("plain", "zero", *_of_kind(s)), _padding),
)


def _parts(subject: Subject, loss: Loss, case: Case) -> str:
    rows, n = subject.rows(loss, case), case.rows
    whole = run(loss, rows)
    if n == 1:
        return ""
    cuts = ([[i] for i in range(n)], [list(range(n - 1)), [n - 1]])
    for parts in cuts:
        fault = _changed(f"cut into {len(parts)} micro-batches", compare(whole, run(loss, rows, How(parts=parts))))
        if fault:
            return fault
    return ""


PARTS = Check(
    "micro-batches",
    "the sum of the micro-batches is the whole step, with units, metrics and prepare",
    "a mean over the batch or a division by its size, a baseline or normalisation over the rows at hand",
    "give values per example or per token and leave the division to the engine; what needs all rows goes into prepare; "
    "metrics are per row",
    for_all(lambda s: s.cases("plain", "near", *_of_kind(s), sizes=MANY), _parts),
)


# --- units -----------------------------------------------------------------------------------------------------------


def _units(subject: Subject, loss: Loss, case: Case) -> str:
    rows, how, objective = subject.rows(loss, case), How(), Objective(loss)
    step = prepare(objective, rows, how, loss.init_state())[0].of(range(case.rows))
    batch = make_batch_of(objective, rows, range(case.rows), rows.policy, step, how)
    real, made_up = terms_of(objective, batch), terms_of(objective, with_policy(batch, MADE_UP))
    counted = [part.mask for part in vars(batch).values() if hasattr(part, "log_ratio")]
    for i, (term, other) in enumerate(zip(real, made_up, strict=True)):
        if count_units(term) != count_units(other):
            return f"term {i} has {count_units(term)} units, and {count_units(other)} with other log-probs"
        if term.mask is not None and not torch.equal(term.mask, other.mask):
            return f"the mask of term {i} changes with the log-probs"
        if term.per == "token" and not any(m.shape == term.mask.shape and (m | ~term.mask).all() for m in counted):
            return f"the mask of term {i} counts tokens that no completion counts"
    return ""


UNITS = Check(
    "units",
    "units are known before the log-probs, and lie within the completions",
    "a mask that is computed from log-probs, or all True for a loss per token",
    "multiply by zero what shall not count; take the mask of the completion",
    for_all(lambda s: s.cases("plain", "near", "far", *_of_kind(s)), _units),
)


# --- declared invariances --------------------------------------------------------------------------------------------


def _longer_prompts(_: Loss, rows: Rows) -> Rows:
    trees = tuple(replace(t, prompt=np.arange(len(t.prompt) + 3 + i, dtype=np.int32)) for i, t in enumerate(rows.trees))
    return replace(rows, trees=trees)


def _shifted(loss: Loss, rows: Rows) -> Rows | None:
    if not loss.needs_reference:
        return None
    return replace(rows, policy=rows.policy - 0.375, reference=rows.reference - 0.375)


def _tokens_turned(_: Loss, rows: Rows) -> Rows:
    """The tokens that count of each completion in reversed order, in all tables."""
    index = torch.arange(len(rows.policy))
    for tree in rows.trees:
        for slot, completion in enumerate(tree.branches):
            start = rows.starts[tree.row, slot]
            span = index[start : start + len(completion.ids)]
            span[rows.counted[span]] = span[rows.counted[span]].flip(0)
    tables: dict[str, Any] = {n: v[index] for n, v in vars(rows).items() if isinstance(v, Tensor) and n != "counted"}
    return replace(rows, **tables, stats={n: v[index] for n, v in rows.stats.items()})


def _rewards(change: Callable[[float], float]) -> Callable[[Loss, Rows], Rows | None]:
    def changed(loss: Loss, rows: Rows) -> Rows | None:
        if loss.data != "groups":
            return None
        trees = (replace(t, rewards=tuple(change(r) for r in t.rewards or ())) for t in rows.trees)
        return replace(rows, trees=tuple(trees))

    return changed


_CHANGES: dict[str, Callable[[Loss, Rows], Rows | None]] = {
    "prompt_length": _longer_prompts,
    "shift": _shifted,
    "token_order": _tokens_turned,
    "reward_shift": _rewards(lambda reward: reward + 1.5),
    "reward_scale": _rewards(lambda reward: reward * 4.0),
}


def _invariance(name: str) -> Callable[[Subject, Loss, Case], str]:
    def fault(subject: Subject, loss: Loss, case: Case) -> str:
        rows = subject.rows(loss, case)
        changed = _CHANGES[name](loss, rows)
        if changed is None:
            return ""
        before, after = run(loss, rows), run(loss, changed)
        if name == "token_order":  # the gradients go with the tokens
            before = replace(before, gradient=after.gradient)
        rtol = 1e-3 if name.startswith("reward_") else 1e-5  # a difference of float32 rewards may be small
        difference = compare(before, after, metrics=False, state=False, rtol=rtol)
        return _changed(f'"{name}" ({INVARIANCES[name]})', difference)

    return fault


def _invariances(subject: Subject) -> Verdict:
    names = sorted(subject.cls.invariances & _CHANGES.keys())
    for name in names:
        verdict = for_all(lambda s: s.cases("plain", "near"), _invariance(name))(subject)
        if verdict.state == "fails":
            return verdict
    return Verdict("holds", ", ".join(names)) if names else Verdict("not tested", "it declares none")


DECLARED_INVARIANCES = Check(
    "invariances",
    "what it declares in invariances holds",
    "a declaration taken from another loss",
    "take the name out of invariances, or mend the loss",
    _invariances,
)


# --- pure ------------------------------------------------------------------------------------------------------------


def _deterministic(subject: Subject, loss: Loss, case: Case) -> str:
    rows = subject.rows(loss, case)
    torch.default_generator.manual_seed(1)
    first = run(loss, rows)
    torch.default_generator.manual_seed(2)
    return _changed("the same rows again, another random seed", compare(first, run(loss, rows)))


DETERMINISTIC = Check(
    "deterministic",
    "the same rows give the same numbers",
    "random numbers inside of the loss",
    "make them out of step.rows, or of numbers that are kept with the data",
    for_all(lambda s: s.cases("plain", sizes=((1, 1), (3, 5), (5, 7))), _deterministic),
)


def _stateless(subject: Subject, loss: Loss, case: Case) -> str:
    rows, other = subject.rows(loss, case), subject.rows(loss, replace(case, seed=case.seed + 7, draw="near"))
    first = run(loss, rows)
    run(loss, other)
    fault = _changed("after a step with other rows", compare(first, run(loss, rows)))
    return fault or _changed("a new instance", compare(first, run(type(loss)(loss.settings), rows)))


STATELESS = Check(
    "stateless",
    "nothing is kept between calls but through init_state and prepare",
    "an attribute, a class attribute or a cache that is written in __call__ or prepare",
    "return it from prepare as state: checkpoints keep that, and all ranks have the same",
    for_all(lambda s: s.cases("plain", sizes=((1, 1), (3, 5))), _stateless),
)


def _tensors(thing: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a batch, a step or a state, with its name."""
    if isinstance(thing, Tensor):
        yield name, thing
    elif isinstance(thing, Mapping):
        for key, value in thing.items():
            yield from _tensors(value, f"{name}[{key!r}]")
    elif is_dataclass(thing):
        for field in fields(thing):
            yield from _tensors(getattr(thing, field.name), f"{name}.{field.name}" if name else field.name)


def _untouched(thing: Any, use: Callable[[Any], object]) -> str:
    before = {name: (t, t._version, t.detach().clone()) for name, t in _tensors(thing)}
    use(thing)
    after = dict(_tensors(thing))
    if before.keys() != after.keys():
        return f"{min(before.keys() ^ after.keys())} was added or removed"
    for name, (tensor, version, copy) in before.items():
        same = after[name] is tensor and torch.equal(tensor.detach().nan_to_num(7e7), copy.nan_to_num(7e7))
        if tensor._version != version or not same:
            return f"{name} was changed in place"
    return ""


def _inputs(subject: Subject, loss: Loss, case: Case) -> str:
    rows, how, objective = subject.rows(loss, case), How(), Objective(loss)
    state = loss.init_state()
    if loss.has_prepare:
        step = step_of(loss, rows, how)
        fault = _untouched(step, lambda s: loss.prepare(s, state)) or _untouched(state, lambda s: loss.prepare(step, s))
        if fault:
            return f"prepare: {fault}"
    prepared = prepare(objective, rows, how, loss.init_state())[0].of(range(case.rows))
    policy = rows.policy.clone().requires_grad_()
    batch = make_batch_of(objective, rows, range(case.rows), policy, prepared, replace(how, padding=3.0))
    return _untouched(batch, loss)


INPUTS = Check(
    "inputs",
    "what it gets is not changed in place",
    "an operation whose name ends in _, or an assignment to an index",
    "masked_fill, torch.where, clone()",
    for_all(lambda s: s.cases("plain", sizes=((1, 1), (3, 5))), _inputs),
)
