"""The reference model: which one, in words, and its log-probs, behind one interface.

Log-probs come from a model that is kept (frozen, or the policy with its adapter off), or from a table that was filled
before training (see precompute.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alignzoo.api import Loss
from alignzoo.batch import Layout
from alignzoo.logprobs import Scorer
from alignzoo.recipe import Recipe


@dataclass(frozen=True)
class ReferencePlan:
    """How the reference is had, decided from the recipe and the loss before any weight is loaded."""

    kind: Literal["none", "adapter_off", "frozen", "cached"]
    words: str


def plan_reference(recipe: Recipe, loss: Loss, *, live_model: bool = False) -> ReferencePlan:
    """None when the loss needs none; adapter off under LoRA when the reference is the base; a frozen copy where it
    moves, completions are sampled during the run, or the recipe asks for one; else log-probs from the cache.
    """
    if not loss.needs_reference:
        return ReferencePlan("none", f'none: "{loss.name}" needs no reference with these settings')
    start = "the model given" if live_model else recipe.model.path
    path, mode = recipe.reference.path, recipe.reference.mode
    every = recipe.reference.sync_every_steps
    if every is not None:
        how = f"moved {recipe.reference.sync_alpha:g} of the way to the policy every {every} steps"
        return ReferencePlan("frozen", f"a copy of the start model {start}, {how}")
    if recipe.model.lora is not None and mode == "auto" and path is None:
        return ReferencePlan("adapter_off", f"adapter switched off: the base model {start}")
    if mode == "live" or recipe.rollout is not None:
        whose = f"model of its own: {path}" if path else f"copy of the start model {start}"
        return ReferencePlan("frozen", f"a frozen {whose}")
    whose = f"a model of its own, {path}" if path else f"the start model {start}"
    return ReferencePlan("cached", f"{whose}: its log-probs from the cache, or computed once before training")


class Reference(Protocol):
    """Gives the reference's log-probs of a layout, (N, T), without a gradient."""

    def score(self, layout: Layout) -> Tensor: ...


class Passes(Protocol):
    """One forward pass of every rank: what this one forwards, and which completions all of them do."""

    @property
    def layout(self) -> Layout: ...

    @property
    def everyone(self) -> Sequence[Sequence[tuple[int, int]]]: ...


class Scores(Protocol):
    """Gives the log-probs of this rank's part of a pass, (N, T)."""

    def score(self, passes: Passes) -> Tensor: ...

    def forget(self) -> None: ...


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
        table, lengths = self.inner.score(layout), lengths_of(layout)
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


class Cached:
    """Log-probs that were computed before training, all of them in memory: no model is forwarded."""

    def __init__(
        self,
        first: Mapping[int, int],
        starts: npt.NDArray[np.int64],
        values: npt.NDArray[np.float32],
        rank: int,
        device: torch.device,
    ) -> None:
        """first: for each row of the data set the number of its first completion

        starts: (C + 1,) where the tokens of each completion begin in `values`; values: (tokens,)
        """
        self.first, self.starts, self.values, self.rank, self.device = first, starts, values, rank, device

    def score(self, passes: Passes) -> Tensor:
        table, lengths = np.zeros(passes.layout.mask.shape, np.float32), lengths_of(passes.layout)
        for n, (row, slot) in enumerate(passes.everyone[self.rank]):
            number = self.first[row] + slot
            own = self.values[self.starts[number] : self.starts[number + 1]]
            assert len(own) == lengths[n]  # of the rows that the table was made for
            table[n, : len(own)] = own
        return torch.from_numpy(table).to(self.device, non_blocking=True)

    def forget(self) -> None:
        """Nothing: the reference does not move."""


def lengths_of(layout: Layout) -> list[int]:
    """Tokens of each completion, counted or not, (N,)."""
    rows, width = layout.mask.shape
    found: list[int] = np.bincount(layout.place // width, minlength=rows).tolist()
    return found
