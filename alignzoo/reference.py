"""The reference model: which one, in words, and its log-probs, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from alignzoo.api import Loss
from alignzoo.batch import Layout
from alignzoo.logprobs import Scorer
from alignzoo.recipe import Recipe


@dataclass(frozen=True)
class ReferencePlan:
    """How the reference is had, decided from the recipe and the loss before any weight is loaded."""

    kind: Literal["none", "adapter_off", "frozen"]
    words: str


def plan_reference(recipe: Recipe, loss: Loss, *, live_model: bool = False) -> ReferencePlan:
    """None when the loss needs none; adapter off under LoRA when the reference is the base; else a frozen copy."""
    if not loss.needs_reference:
        return ReferencePlan("none", f'none: "{loss.name}" needs no reference with these settings')
    start = "the model given" if live_model else recipe.model.path
    path = recipe.reference.path
    if path is not None:
        return ReferencePlan("frozen", f"a frozen model of its own: {path}")
    every = recipe.reference.sync_every_steps
    if every is not None:
        how = f"moved {recipe.reference.sync_alpha:g} of the way to the policy every {every} steps"
        return ReferencePlan("frozen", f"a copy of the start model {start}, {how}")
    if recipe.model.lora is not None and recipe.reference.mode == "auto":
        return ReferencePlan("adapter_off", f"adapter switched off: the base model {start}")
    return ReferencePlan("frozen", f"a frozen copy of the start model {start}")


class Reference(Protocol):
    """Gives the reference's log-probs of a layout, (N, T), without a gradient."""

    def score(self, layout: Layout) -> Tensor: ...


class Passes(Protocol):
    """One forward pass of every rank: what this one forwards, and which completions all of them do."""

    @property
    def layout(self) -> Layout: ...

    @property
    def everyone(self) -> Sequence[Sequence[tuple[int, int]]]: ...


class FrozenReference:
    """A second model that never changes."""

    def __init__(self, forward: Callable[[Layout], dict[str, Tensor]]) -> None:
        self.forward = forward

    @torch.no_grad()
    def score(self, layout: Layout) -> Tensor:
        return self.forward(layout)["logps"]


class AdapterOff:
    """The policy with its adapter switched off: no second model in memory."""

    def __init__(self, policy: Scorer, forward: Callable[[Layout], dict[str, Tensor]]) -> None:
        self.policy, self.forward = policy, forward

    @torch.no_grad()
    def score(self, layout: Layout) -> Tensor:
        training = self.policy.training
        self.policy.eval()  # no dropout in the reference
        try:
            with self.policy.without_adapter():
                return self.forward(layout)["logps"]
        finally:
            self.policy.train(training)


class Remembering:
    """Keeps the log-probs of each completion, so that a row that comes again (at the next evaluation, or after the
    pass for `prepare`) is not forwarded again.

    A sharded reference is a collective: all ranks forward, or none does. So each keeps book of what all have.
    """

    def __init__(self, inner: Reference, rank: int = 0, ranks: int = 1) -> None:
        self.inner, self.rank = inner, rank
        self.kept: dict[tuple[int, int], Tensor] = {}  # (row, number of the completion) -> (t,)
        self.seen: list[set[tuple[int, int]]] = [set() for _ in range(ranks)]

    def score(self, passes: Passes) -> Tensor:
        """The log-probs of this rank's layout, (N, T); zeros where it forwards for company and nobody has to."""
        if all(key in seen for seen, keys in zip(self.seen, passes.everyone, strict=True) for key in keys):
            return self._from_memory(passes)
        layout = passes.layout
        table, lengths = self.inner.score(layout), _lengths(layout)
        for seen, keys in zip(self.seen, passes.everyone, strict=True):
            seen.update(keys)
        if passes.everyone[self.rank]:
            for n, key in enumerate(layout.keys):
                self.kept[key] = table[n, : lengths[n]].clone()
        return table

    def _from_memory(self, passes: Passes) -> Tensor:
        rows = [self.kept[key] for key in passes.everyone[self.rank]]
        table = rows[0].new_zeros(passes.layout.mask.shape) if rows else torch.zeros(passes.layout.mask.shape)
        for n, row in enumerate(rows):
            table[n, : len(row)] = row
        return table

    def forget(self) -> None:
        self.kept.clear()
        self.seen = [set() for _ in self.seen]


def _lengths(layout: Layout) -> list[int]:
    """Tokens of each completion, counted or not, (N,)."""
    width = layout.mask.shape[1]
    counts = [0] * layout.mask.shape[0]
    for place in layout.place.tolist():
        counts[place // width] += 1
    return counts
