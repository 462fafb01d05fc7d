"""The loss where policy and reference are the same: for many losses one number, whatever the data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from alignzoo.api import Loss, LossOutput
from alignzoo.batch import Layout, padded_layout
from alignzoo.objective import Objective, Scored, make_step
from alignzoo.tree import Completion, Tree

ROWS = 6
NOISE = 1e-5  # what float32 may make of values that are the same, relative, or absolute below 1


def loss_at_reference(loss: Loss, columns: Sequence[str] = ()) -> float | None:
    """What a run's loss is before its first step if the start model is the reference: ln 2 for DPO. None: it depends.

    The loss is asked twice, with made-up rows of made-up log-probs, the reference's equal to the policy's. Where every
    unit of a term has one and the same value both times, that is the value for all data. So a loss has none that
    imitates, that needs no reference, whose rows weigh differently, or that reads more than log-ratios; nor has one
    on groups, whose advantages come from rewards, and one that fails on made-up rows.
    columns: the names in data.keep
    """
    if not loss.needs_reference or loss.data == "groups":
        return None
    try:
        values = [term for seed in (0, 1) for term in _terms(_ask(loss, columns, seed))]
    except Exception:  # a stranger's code on rows that it was not made for; the run will tell what is wrong with it
        return None
    half = len(values) // 2
    for first, second in zip(values[:half], values[half:], strict=True):
        both = torch.cat([first, second])
        if both.numel() and (both - both[0]).abs().max() > NOISE * max(1.0, float(both[0].abs())):
            return None
    return float(sum(value[0] for value in values[:half] if value.numel()))


def _terms(output: LossOutput) -> list[Tensor]:
    """The values of the units of each term."""
    return [(t.loss.flatten() if t.mask is None else t.loss[t.mask]).double() for t in output.terms]


@torch.no_grad()
def _ask(loss: Loss, columns: Sequence[str], seed: int) -> LossOutput:
    objective = Objective(loss)
    trees = [_tree(loss, row, columns, np.random.default_rng([seed, row])) for row in range(ROWS)]
    step: dict[str, Tensor] = {}
    if loss.has_prepare:
        table = None
        if loss.prepare_pass:
            branches = padded_layout(trees, mismatched=loss.needs_mismatched)
            sums = _log_probs(branches, seed).sum(-1)
            table = torch.stack([sums, sums, torch.from_numpy(branches.mask).sum(-1).float()], -1)
        completions = sum(len(tree.completions) for tree in trees)
        step, _ = objective.prepare(make_step(loss, trees, table), loss.init_state(), completions)
    layout = padded_layout(trees)
    log_probs = _log_probs(layout, seed)
    stats = {name: log_probs.abs() for name in objective.stats}
    if "is_top1" in stats:
        stats["is_top1"] = stats["is_top1"] > 1.0
    return objective(objective.batch(Scored(trees, layout, {"logps": log_probs, **stats}, log_probs, step)))


def _tree(loss: Loss, row: int, columns: Sequence[str], rng: np.random.Generator) -> Tree:
    """A row of the loss's kind of data, with completions of several lengths."""

    def completion() -> Completion:
        return Completion(rng.integers(0, 9, int(rng.integers(1, 8))).astype(np.int32))

    return Tree(
        row,
        np.zeros(1, np.int32),
        tuple(completion() for _ in range(2 if loss.data == "pairs" else 1)),
        label=bool(row % 2) if loss.data == "labelled" else None,
        extra={name: float(rng.random()) for name in columns},
        mismatched=completion() if loss.needs_mismatched else None,
    )


def _log_probs(layout: Layout, seed: int) -> Tensor:
    """Made-up log-probs, (N, T), 0 outside of the mask; a completion has the same ones in every layout."""
    found = np.zeros(layout.mask.shape, np.float32)
    for row, key in zip(found, layout.keys, strict=True):
        row[:] = -3 * np.random.default_rng([seed, *key]).random(len(row))
    return torch.from_numpy(np.where(layout.mask, found, np.float32(0)))
