"""Between the scorer and a loss: log-probs or scores into the batch that the loss eats, and its output checked.

The only place that knows how trees become `Demonstrations`, `Pairs`, `ScoredPairs`, `Labelled` and `Groups`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignzoo.api import (
    KINDS,
    Batch,
    CompletionScores,
    Demonstrations,
    Groups,
    Labelled,
    LogProbs,
    Loss,
    LossOutput,
    Metric,
    Pairs,
    ScoredPairs,
    SequenceStats,
    Step,
    Term,
)
from alignzoo.batch import Layout
from alignzoo.errors import PluginError
from alignzoo.tree import LogPs, Tree

State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Prepared:
    """What `prepare` returned for a step, and where each tree's completions begin in it."""

    values: Mapping[str, Tensor] = field(default_factory=dict)
    starts: tuple[int, ...] = ()  # one per tree of the step, and the end

    def of(self, members: Sequence[int]) -> dict[str, Tensor]:
        """The values for some trees of the step: per-row ones sliced, those of 0 dimensions whole."""
        if not self.values:
            return {}
        index = [n for i in members for n in range(self.starts[i], self.starts[i + 1])]
        return {name: v if v.dim() == 0 else v[index] for name, v in self.values.items()}


@dataclass(frozen=True, eq=False)
class Scored:
    """A micro-batch with what a Scorer made of it."""

    trees: Sequence[Tree]
    layout: Layout
    scores: Mapping[str, Tensor]  # logps (N, T) and token statistics, or score (N,)
    reference: Tensor | None  # (N, T)
    step: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return of_policy(self.scores).device


def of_policy(scores: Mapping[str, Tensor]) -> Tensor:
    """What a Scorer made of the completions: log-probs (N, T), or scores (N,)."""
    return scores["score"] if "score" in scores else scores["logps"]


class Objective:
    """One loss, applied to micro-batches."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.stats = tuple(sorted(loss.token_stats))

    def batch(self, scored: Scored) -> Batch:
        """The batch of the loss's kind of data."""
        make = _scored_pairs if self.loss.needs_scores else _BATCHES[self.loss.data]
        return make(self.loss, scored)

    def __call__(self, batch: Batch) -> LossOutput:
        """The loss's output, checked against the contract."""
        output = self.loss(batch)
        check_output(self.loss, batch, output)
        return output

    @torch.no_grad()
    def units(self, trees: Sequence[Tree], layout: Layout, step: Mapping[str, Tensor]) -> tuple[int, ...]:
        """How many units each term of the loss has on these trees, known before any forward pass.

        The loss is asked with made-up log-probs: its masks depend on the data, never on log-probs (the contract).
        """
        made_up = torch.full(layout.mask.shape, -1.0)
        scores = {"logps": made_up, **{name: torch.zeros(layout.mask.shape) for name in self.stats}}
        if "is_top1" in scores:
            scores["is_top1"] = scores["is_top1"].bool()
        if self.loss.needs_scores:
            scores = {"score": torch.zeros(len(layout.mask))}
        reference = made_up if self.loss.needs_reference else None
        on_cpu = {name: value.cpu() for name, value in step.items()}
        output = self(self.batch(Scored(trees, layout, scores, reference, on_cpu)))
        return tuple(count_units(term) for term in output.terms)

    def prepare(self, step: Step, state: State, n_completions: int) -> tuple[dict[str, Tensor], State]:
        """`loss.prepare`, its results checked."""
        values, new_state = self.loss.prepare(step, state)
        for name, value in {**values, **new_state}.items():
            if not isinstance(value, Tensor) or value.requires_grad:
                raise _breach(self.loss, f'prepare returned "{name}", which is no detached tensor')
        for name, value in values.items():
            if value.dim() and value.shape[0] != n_completions:
                shape = tuple(value.shape)
                raise _breach(
                    self.loss, f'prepare returned "{name}" of shape {shape}; the step has {n_completions} rows'
                )
        return values, new_state


def count_units(term: Term) -> int:
    return term.loss.shape[0] if term.mask is None else int(term.mask.sum())


def masked_sum(term: Term) -> Tensor:
    """The sum of a term's loss over its units, ()."""
    return term.loss.sum() if term.mask is None else term.loss.masked_fill(~term.mask, 0.0).sum()


# --- batches ---------------------------------------------------------------------------------------------------------


def _log_probs(owner: str, stats: Collection[str], scored: Scored, slot: int | None) -> LogProbs:
    """The completions of one slot (0 chosen, 1 rejected; None: all), cut to the longest of them."""
    mask = torch.from_numpy(scored.layout.mask).to(scored.device)
    rows = [n for n, (_, k) in enumerate(scored.layout.keys) if slot is None or k == slot]
    width = int(mask[rows].any(0).nonzero().max()) + 1

    def take(table: Tensor | None) -> Tensor | None:
        return None if table is None else table[rows, :width]

    fields = {name: take(value) for name, value in scored.scores.items() if name in stats}
    policy, counted = scored.scores["logps"][rows, :width], mask[rows, :width]
    return LogProbs(policy, counted, take(scored.reference), owner=owner, **fields)


def _common(scored: Scored) -> dict[str, Any]:
    return {"extra": extra_columns(scored.trees, scored.device), "step": scored.step}


def extra_columns(trees: Sequence[Tree], device: torch.device) -> dict[str, Tensor]:
    """The columns of data.keep, (B,) float32."""
    names = trees[0].extra.keys()
    return {n: torch.tensor([t.extra[n] for t in trees], dtype=torch.float32, device=device) for n in names}


def _demonstrations(loss: Loss, scored: Scored) -> Batch:
    return Demonstrations(completion=_log_probs(loss.name, loss.token_stats, scored, 0), **_common(scored))


def _pairs(loss: Loss, scored: Scored) -> Batch:
    return Pairs(
        chosen=_log_probs(loss.name, loss.token_stats, scored, 0),
        rejected=_log_probs(loss.name, loss.token_stats, scored, 1),
        **_common(scored),
    )


def _scored_pairs(_: Loss, scored: Scored) -> Batch:
    slots = torch.tensor([slot for _, slot in scored.layout.keys], device=scored.device)
    score, lengths = scored.scores["score"], torch.from_numpy(scored.layout.mask).to(scored.device).sum(-1)
    chosen, rejected = (CompletionScores(score[slots == slot], lengths[slots == slot]) for slot in (0, 1))
    return ScoredPairs(chosen=chosen, rejected=rejected, **_common(scored))


def pairs_of(scored: Scored) -> Pairs:
    """Pairs without a loss, to measure which side a policy prefers."""
    return Pairs(chosen=_log_probs("evaluation", (), scored, 0), rejected=_log_probs("evaluation", (), scored, 1))


def _labelled(loss: Loss, scored: Scored) -> Batch:
    completion = _log_probs(loss.name, loss.token_stats, scored, 0)
    return Labelled(completion=completion, **per_row(scored.trees, completion.mask.device), **_common(scored))


def _groups(loss: Loss, scored: Scored) -> Batch:
    completion = _log_probs(loss.name, loss.token_stats, scored, None)
    sampled = [c for t in scored.trees for c in t.completions]
    return Groups(
        completion=completion,
        old=_table([c.old for c in sampled], completion.policy),
        sampler=_table([c.sampler for c in sampled], completion.policy),
        **per_row(scored.trees, completion.mask.device),
        **_common(scored),
    )


def _table(rows: Sequence[LogPs | None], like: Tensor) -> Tensor | None:
    """Log-probs of completions as (N, T), zeros behind their ends; None where they are not known."""
    found = np.zeros(like.shape, np.float32)
    for n, row in enumerate(rows):
        if row is None:
            return None
        found[n, : len(row)] = row[: found.shape[1]]
    return torch.from_numpy(found).to(like.device)


_BATCHES: dict[str, Callable[[Loss, Scored], Batch]] = {
    "demonstrations": _demonstrations,
    "pairs": _pairs,
    "labelled": _labelled,
    "groups": _groups,
}
assert _BATCHES.keys() == KINDS.keys()


def per_row(trees: Sequence[Tree], device: torch.device) -> dict[str, Any]:
    """What trees carry beside their tokens: label (B,); rewards, group and truncated (N,)."""
    if trees[0].label is not None:
        return {"label": torch.tensor([bool(t.label) for t in trees], device=device)}
    if trees[0].rewards is not None:
        group = [i for i, t in enumerate(trees) for _ in t.completions]
        truncated = [flag for t in trees for flag in (t.truncated or [False] * len(t.completions))]
        return {
            "rewards": torch.tensor([r for t in trees for r in t.rewards or ()], dtype=torch.float32, device=device),
            "group": torch.tensor(group, device=device),
            "truncated": torch.tensor(truncated, device=device),
        }
    return {}


def make_step(loss: Loss, trees: Sequence[Tree], table: Tensor | None) -> Step:
    """What `prepare` reads. table: (N, 3) policy sum, reference sum and length of every branch, trees in order."""
    device = torch.device("cpu") if table is None else table.device
    sequences: dict[str, Any] = {}
    if table is not None:
        names = {"pairs": ("chosen", "rejected")}.get(loss.data, ("completion",))
        slots = [slot for t in trees for slot in _slot_names(t, names, loss.needs_mismatched)]
        for name in dict.fromkeys(slots):
            rows = table[[n for n, slot in enumerate(slots) if slot == name]]
            reference = rows[:, 1] if loss.needs_reference else None
            sequences[name] = SequenceStats(rows[:, 0], rows[:, 2], reference, owner=loss.name)
    row_ids = torch.tensor([t.row for t in trees], device=device)
    return Step(rows=row_ids, extra=extra_columns(trees, device), **per_row(trees, device), **sequences)


def _slot_names(tree: Tree, names: tuple[str, ...], mismatched: bool) -> list[str]:
    named = list(names) if len(names) > 1 else [names[0]] * len(tree.completions)
    return [*named, "mismatched"] if mismatched else named


# --- checks ----------------------------------------------------------------------------------------------------------


def _breach(loss: Loss, what: str) -> PluginError:
    return PluginError(f'loss "{loss.name}": {what}', why="it breaks the contract of a loss", fix="see docs/plugins.md")


def log_probs_of(batch: Batch) -> dict[str, LogProbs]:
    """The completions of a batch by their names."""
    return {name: value for name, value in vars(batch).items() if isinstance(value, LogProbs)}


def check_output(loss: Loss, batch: Batch, output: Any) -> None:
    """Raises PluginError where shapes, masks, metrics or rewards do not fit the batch."""
    if not isinstance(output, LossOutput):
        raise _breach(loss, f"it returned a {type(output).__name__}, not a LossOutput")
    tables = {tuple(s.mask.shape) for s in log_probs_of(batch).values()}  # none of scores
    n = len(batch.chosen.score) if isinstance(batch, ScoredPairs) else min(tables)[0]
    for term in output.terms:
        _check_term(loss, term, n, tables)
    for name, value in output.metrics.items():
        _check_metric(loss, name, value, n)
    rewards = () if output.rewards is None else output.rewards
    for reward in rewards if isinstance(rewards, tuple) else (rewards,):
        if not isinstance(reward, Tensor) or reward.shape != (n,) or reward.requires_grad:
            raise _breach(loss, f"rewards are detached tensors of shape ({n},)")
    wanted = 2 if loss.data == "pairs" else 1
    if output.rewards is not None and (len(rewards) if isinstance(rewards, tuple) else 1) != wanted:
        raise _breach(loss, "rewards are (chosen, rejected) for pairs, one tensor for other data")
    if output.threshold is not None:
        _check_threshold(loss, output, n)


def _check_threshold(loss: Loss, output: LossOutput, n: int) -> None:
    threshold = output.threshold
    if not isinstance(threshold, Tensor) or threshold.shape not in ((), (n,)) or threshold.requires_grad:
        raise _breach(loss, f"a threshold is a detached tensor of shape () or ({n},)")
    if loss.data != "labelled" or output.rewards is None:
        raise _breach(loss, "a threshold is for the rewards of labelled rows")


def _check_term(loss: Loss, term: Term, n: int, tables: set[tuple[int, ...]]) -> None:
    shape = tuple(term.loss.shape)
    if term.per == "example" and shape != (n,):
        raise _breach(loss, f"a loss per example has shape {shape}; wanted ({n},)")
    if term.per == "token" and shape not in tables:
        wanted = " or ".join(str(t) for t in sorted(tables)) or "one per example: scores have no tokens"
        raise _breach(loss, f"a loss per token has shape {shape}; wanted {wanted}")
    if term.per not in ("example", "token"):
        raise _breach(loss, f'per = {term.per!r}; wanted "example" or "token"')
    if term.mask is None and term.per == "token":
        raise _breach(loss, "a loss per token needs its mask")
    if term.mask is not None and (tuple(term.mask.shape) != shape or term.mask.dtype != torch.bool):
        raise _breach(loss, f"the mask is {term.mask.dtype} of shape {tuple(term.mask.shape)}; wanted bool of {shape}")


def _check_metric(loss: Loss, name: str, value: Any, n: int) -> None:
    tensor = value.values if isinstance(value, Metric) else value
    if not isinstance(tensor, Tensor) or tensor.requires_grad:
        raise _breach(loss, f'metric "{name}" is no detached tensor')
    if tensor.dim() == 0:
        raise _breach(loss, f'metric "{name}" is a scalar: a mean of means depends on the micro-batches; give ({n},)')
    if not isinstance(value, Metric) and tuple(tensor.shape) != (n,):
        raise _breach(loss, f'metric "{name}" has shape {tuple(tensor.shape)}; wanted ({n},), or use alignzoo.metric')
