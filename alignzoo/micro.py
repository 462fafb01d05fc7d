"""The micro-batches of one step on all ranks, and what is collected while they are worked through.

Under ZeRO-2 and 3 every forward and every backward pass is a collective, so all ranks do the same number of them: a
rank that has no rows left keeps the others company with a tiny tree, times 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from alignzoo.api import LossOutput
from alignzoo.batch import PADDED, Layout, Way
from alignzoo.errors import RunError
from alignzoo.logprobs import head_pieces
from alignzoo.metrics import Accumulator, Table
from alignzoo.objective import masked_sum
from alignzoo.tree import Completion, Tree

Keys = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Some trees of a step, laid out for one forward pass."""

    trees: Sequence[Tree]
    layout: Layout
    step: Mapping[str, Tensor] = field(default_factory=dict)  # the results of `prepare` for these trees
    units: tuple[int, ...] = ()  # of each term of the loss

    @property
    def counted(self) -> int:
        """Completion tokens that count."""
        return sum(c.counted for t in self.trees for c in t.completions)


@dataclass(frozen=True)
class Whole:
    """What a step's sums are divided by."""

    units: tuple[int, ...]  # of each term, over all micro-batches and ranks
    counted: int

    @staticmethod
    def of(micro: Sequence[MicroBatch]) -> Whole:
        return Whole(tuple(sum(u) for u in zip(*(m.units for m in micro), strict=True)), sum(m.counted for m in micro))


@dataclass(frozen=True, eq=False)
class Round:
    """One forward pass of every rank."""

    mine: MicroBatch | None  # None: this rank has no rows left
    tiny: Tree  # what it forwards then
    everyone: tuple[Keys, ...]  # which completions each rank forwards
    pieces: int  # into which each rank's head cuts its tokens: under ZeRO-3 each is a collective too
    way: Way = PADDED

    @cached_property
    def layout(self) -> Layout:
        layout = self.way.layout([self.tiny]) if self.mine is None else self.mine.layout
        return replace(layout, pieces=self.pieces)


def rounds_of(ranks: Sequence[Sequence[MicroBatch]], rank: int, way: Way = PADDED) -> list[Round]:
    """The micro-batches of each rank as rounds, for `rank`. Every rank gets the same number."""
    tiny = tiny_tree(next(m for of_rank in ranks for m in of_rank).trees[0])
    found = []
    for i in range(max(len(of_rank) for of_rank in ranks)):
        everyone = tuple(of_rank[i].layout.keys if i < len(of_rank) else () for of_rank in ranks)
        pieces = max(head_pieces(of_rank[i].layout) for of_rank in ranks if i < len(of_rank))
        found.append(Round(ranks[rank][i] if i < len(ranks[rank]) else None, tiny, everyone, pieces, way))
    return found


def tiny_tree(tree: Tree) -> Tree:
    """Two tokens of a tree: what is forwarded for company."""
    return Tree(-1, tree.prompt[:1], (Completion(tree.completions[0].ids[:1]),), where="company")


@contextmanager
def memory_in_words(when: str, round: Round, budget: int) -> Iterator[None]:
    """Turns the end of the memory into a RunError that says what was forwarded, and which settings help."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        layout, tokens = round.layout, round.mine.trees if round.mine else [round.tiny]
        longest = max(t.tokens for t in tokens)
        raise RunError(
            f"{when}: no memory left for a micro-batch of {layout.positions} positions "
            f"({layout.mask.shape[0]} completions, the longest row has {longest} tokens)",
            why=str(error).splitlines()[0],
            fix=f"lower engine.tokens_per_device (now {budget}); engine.gradient_checkpointing = true; [model.lora]; "
            "lower data.max_length if single rows are the problem; engine.zero and its offload on several GPUs",
        ) from error


@dataclass
class Tally:
    """What is collected until the next line of metrics."""

    metrics: Accumulator = field(default_factory=Accumulator)
    losses: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    skipped: int = 0

    def to_json(self, metrics: Sequence[Table]) -> dict[str, Any]:
        """For a checkpoint. metrics: of each rank; the rest is the same on all."""
        losses = [loss.item() for loss in self.losses]
        return {
            "metrics": Accumulator.merged(metrics).table(), "losses": losses, "seconds": self.seconds,
            "tokens": self.tokens, "skipped": self.skipped,
        }  # fmt: skip

    def load_json(self, saved: Mapping[str, Any], rank: int) -> None:
        """What `to_json` gave. The metrics of all ranks go to rank 0: they are summed up again anyway."""
        self.metrics = Accumulator.merged([saved["metrics"]] if rank == 0 else [])
        self.losses = [torch.tensor(loss, dtype=torch.float64) for loss in saved["losses"]]
        self.seconds, self.tokens, self.skipped = saved["seconds"], saved["tokens"], saved["skipped"]


@dataclass
class BadRows:
    """The rows whose log-probs or loss are not finite."""

    what: str = ""
    rows: list[str] = field(default_factory=list)

    def look(self, micro: MicroBatch, policy: Tensor, reference: Tensor | None, output: LossOutput) -> None:
        """policy: (N, T) log-probs, or (N,) scores."""
        of_policy = "a log-prob of the policy" if policy.dim() > 1 else "a score"
        for what, table in {of_policy: policy, "a log-prob of the reference": reference}.items():
            if table is not None and not torch.isfinite(table).all():
                index = (~torch.isfinite(table)).view(len(table), -1).any(-1).nonzero().flatten().tolist()
                self._add(what, {micro.layout.keys[n][0] for n in index}, micro)
                return
        if not all(torch.isfinite(masked_sum(t)) for t in output.terms):
            self._add("the loss", {t.row for t in micro.trees}, micro)

    def _add(self, what: str, rows: set[int], micro: MicroBatch) -> None:
        self.what = self.what or f"{what} is not finite"
        self.rows += [t.where or str(t.row) for t in micro.trees if t.row in rows]
