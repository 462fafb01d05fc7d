"""A loss on the rows of a step, the way the engine goes: prepare, units, micro-batches, sums, metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignzoo.api import Batch, Groups, LogProbs, Loss, LossOutput, ScoredPairs, Step
from alignzoo.batch import Layout, padded_layout
from alignzoo.metrics import Accumulator, record
from alignzoo.objective import Objective, Prepared, Scored, State, count_units, log_probs_of, make_step, masked_sum
from alignzoo.testing.rows import Rows

MADE_UP = -1.0
Parts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class How:
    """What must not change the result, or what shall."""

    dtype: torch.dtype = torch.float64
    parts: Parts | None = None  # the micro-batches, as places in rows.trees; None: one of all rows
    padding: float | None = None  # the value at tokens that do not count; None: 0 behind the end, drawn ones within
    wider: int = 0  # columns of padding beyond the longest completion
    reference: bool | None = None  # None: where the loss needs it


@dataclass(frozen=True, eq=False)
class Outcome:
    """A step: what the engine makes of it."""

    loss: Tensor  # () each term's sum by its units, added up
    sums: Tensor  # (terms,)
    units: tuple[int, ...]
    gradient: Tensor  # (M,) d loss / d policy
    metrics: Mapping[str, float]
    prepared: Mapping[str, Tensor]
    state: State
    batches: tuple[Batch, ...] = field(repr=False, default=())
    outputs: tuple[LossOutput, ...] = field(repr=False, default=())

    def values(self) -> list[float]:
        """The values of the units, term after term; of one micro-batch."""
        terms = [term for output in self.outputs for term in output.terms]
        return [v for t in terms for v in (t.loss if t.mask is None else t.loss[t.mask]).flatten().tolist()]


def run(loss: Loss, rows: Rows, how: How | None = None, state: State | None = None) -> Outcome:
    """One optimizer step. Raises PluginError where the loss breaks the contract."""
    how = how or How()
    objective, policy = Objective(loss), rows.policy.detach().to(how.dtype).requires_grad_()
    prepared, state = prepare(objective, rows, how, loss.init_state() if state is None else state)
    parts = how.parts or [range(len(rows.trees))]
    batches = [make_batch_of(objective, rows, part, policy, prepared.of(part), how) for part in parts]
    outputs = [objective(batch) for batch in batches]
    counts = [tuple(map(count_units, terms_of(objective, with_policy(batch, MADE_UP)))) for batch in batches]
    units = tuple(sum(c) for c in zip(*counts, strict=True))
    sums = torch.stack([torch.stack([masked_sum(t) for t in o.terms]) for o in outputs]).sum(0)  # (terms,)
    total = (sums / torch.tensor([max(u, 1) for u in units])).sum()
    gradient = torch.zeros_like(policy)
    if total.requires_grad:
        gradient = torch.autograd.grad(total, policy, allow_unused=True)[0]
        gradient = torch.zeros_like(policy) if gradient is None else gradient
    into = Accumulator()
    for batch, output in zip(batches, outputs, strict=True):
        record(into, loss.name, batch, output)
    metrics = into.result()
    return Outcome(
        total.detach(), sums.detach(), units, gradient, metrics, prepared.values, state, tuple(batches), tuple(outputs)
    )


@torch.no_grad()
def terms_of(objective: Objective, batch: Batch) -> Any:
    return objective(batch).terms


def step_of(loss: Loss, rows: Rows, how: How) -> Step:
    """What `prepare` reads of the rows: sums over the tokens that count, float32 unless all is float64."""
    table = None
    if loss.prepare_pass:
        dtype = torch.float64 if how.dtype == torch.float64 else torch.float32
        policy, reference = (
            values.masked_fill(~rows.counted, 0.0).to(dtype) for values in (rows.policy, rows.reference)
        )
        spans = [_span(rows, t.row, slot, len(c.ids)) for t in rows.trees for slot, c in enumerate(t.branches)]
        numbers = [(policy[s].sum(), reference[s].sum(), rows.counted[s].sum()) for s in spans]
        table = torch.tensor(numbers, dtype=dtype)
    return make_step(loss, rows.trees, table)


def prepare(objective: Objective, rows: Rows, how: How, state: State) -> tuple[Prepared, State]:
    """As the engine's."""
    if not objective.loss.has_prepare:
        return Prepared(), state
    counts = [len(t.completions) for t in rows.trees]
    starts = tuple(sum(counts[:i]) for i in range(len(counts) + 1))
    values, new_state = objective.prepare(step_of(objective.loss, rows, how), state, starts[-1])
    return Prepared(values, starts), new_state


def _span(rows: Rows, row: int, slot: int, size: int) -> slice:
    return slice(rows.starts[row, slot], rows.starts[row, slot] + size)


def make_batch_of(
    objective: Objective, rows: Rows, members: Sequence[int], policy: Tensor, step: Mapping[str, Tensor], how: How
) -> Batch:
    """The batch of some rows. policy: (M,), the leaf that gradients are asked of.

    A score is the sum of its completion's policy over the tokens that count, so it is tested as log-probs are.
    """
    trees = [rows.trees[i] for i in members]
    layout = padded_layout(trees)
    table = _Tabler(rows, layout, how.padding)
    needs = objective.loss.needs_reference if how.reference is None else how.reference
    reference = table(rows.reference.to(policy.dtype), 1.0) if needs else None
    scores = {"logps": table(policy), **{n: table(rows.stats[n].to(_like(rows.stats[n], policy)), 2.0)
              for n in objective.stats}}  # fmt: skip
    if objective.loss.needs_scores:
        scores = {"score": scores["logps"].masked_fill(~torch.from_numpy(layout.mask), 0.0).sum(-1)}
    batch = objective.batch(Scored(trees, layout, scores, reference, step))
    if isinstance(batch, Groups):
        width, given = batch.completion.mask.shape[1], {"old": (rows.old, 3.0), "sampler": (rows.sampler, 4.0)}
        made: dict[str, Any] = {
            n: table(v.to(policy.dtype), at)[:, :width] for n, (v, at) in given.items() if v is not None
        }
        batch = replace(batch, **made)
    return widened(batch, how.wider, how.padding or 0.0) if how.wider else batch


def _like(values: Tensor, policy: Tensor) -> torch.dtype:
    return policy.dtype if values.dtype.is_floating_point else values.dtype


@dataclass(frozen=True, eq=False)
class _Tabler:
    """(M,) values as the (N, T) table of a layout, with gradients."""

    rows: Rows
    layout: Layout
    padding: float | None

    def __call__(self, values: Tensor, more: float = 0.0) -> Tensor:
        """more: by how much the padding grows, so that no two tables have the same."""
        trees = {tree.row: tree for tree in self.rows.trees}
        spans = [
            (self.rows.starts[key], len(trees[key[0]].branches[key[1]].ids)) for key in self.layout.keys
        ]  # rows of a layout follow the trees, as its place does
        index = np.concatenate([np.arange(start, start + size) for start, size in spans])
        flat = values.new_zeros(self.layout.mask.size)
        flat = flat.index_copy(0, torch.from_numpy(self.layout.place), values[torch.from_numpy(index)])
        table, mask = flat.view(self.layout.mask.shape), torch.from_numpy(self.layout.mask)
        return table if self.padding is None else table.masked_fill(~mask, self.padding * (1 + more))


def on_tables(batch: Batch, change: Callable[[str, Tensor], Tensor]) -> Batch:
    """The batch with its (N, T) tensors changed. change: (name, table) -> table."""
    changed: dict[str, Any] = {}
    for name, part in log_probs_of(batch).items():
        tables = {k: v for k, v in vars(part).items() if isinstance(v, Tensor) and v.dim() == 2}
        changed[name] = LogProbs(**{k: change(k, v) for k, v in tables.items()}, owner=part.owner)
    changed |= {k: change(k, v) for k, v in vars(batch).items() if isinstance(v, Tensor) and v.dim() == 2}
    return replace(batch, **changed)


def with_policy(batch: Batch, value: float) -> Batch:
    """The batch with made-up log-probs of policy and reference, or scores, as the engine counts units."""
    if isinstance(batch, ScoredPairs):
        both = (batch.chosen, batch.rejected)
        chosen, rejected = (replace(side, score=torch.full_like(side.score, value)) for side in both)
        return replace(batch, chosen=chosen, rejected=rejected)
    return on_tables(batch, lambda name, t: torch.full_like(t, value) if name in ("policy", "reference") else t)


def widened(batch: Batch, columns: int, padding: float) -> Batch:
    """The batch with columns of padding behind all of its tables."""

    def wider(_: str, table: Tensor) -> Tensor:
        more = table.new_full((table.shape[0], columns), padding if table.dtype != torch.bool else False)
        return torch.cat([table, more.to(table.dtype)], -1)

    return on_tables(batch, wider)


def compare(a: Outcome, b: Outcome, *, metrics: bool = True, state: bool = True, rtol: float = 1e-5) -> str:
    """The first thing in which two outcomes differ beyond rounding, "" where there is none.

    rtol: rewards, columns and states are float32
    """
    if a.units != b.units:
        return f"the units of its terms are {_many(a.units)} and {_many(b.units)}"
    if not _close(a.sums, b.sums, rtol):
        return f"the sums of its terms are {_numbers(a.sums)} and {_numbers(b.sums)}"
    if a.gradient.shape == b.gradient.shape and not _close(a.gradient, b.gradient, rtol):
        worst = int((a.gradient - b.gradient).abs().nan_to_num(torch.inf).argmax())
        return f"a gradient is {a.gradient[worst]:.6g} and {b.gradient[worst]:.6g}"
    if metrics:
        if a.metrics.keys() != b.metrics.keys():
            return f"the metric {min(a.metrics.keys() ^ b.metrics.keys())} is there only once"
        for name, value in a.metrics.items():
            if not _close(torch.tensor(value), torch.tensor(b.metrics[name]), rtol):
                return f"the metric {name} is {value:.6g} and {b.metrics[name]:.6g}"
    if state:
        for name in a.state.keys() | b.state.keys():
            if name not in a.state or name not in b.state or not _close(a.state[name], b.state[name], rtol):
                return f'the new state "{name}" differs'
    return ""


def _close(a: Tensor, b: Tensor, rtol: float) -> bool:
    """Equal up to rounding, relative to the largest number; NaN equals NaN."""
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    scale = float(a.nan_to_num(0.0, 0.0, 0.0).abs().max()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=rtol, atol=rtol / 100 * scale + 1e-12, equal_nan=True)


def _many(units: Sequence[int]) -> str:
    return " and ".join(map(str, units)) if len(units) == 1 else f"({', '.join(map(str, units))})"


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{v:.6g}" for v in values.tolist())
