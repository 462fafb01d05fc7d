"""Metrics of a step: sums and counts over micro-batches, under the names that people's dashboards have."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignzoo.api import Batch, Labelled, LogProbs, LossOutput, Metric, Pairs, ScoredPairs
from alignzoo.errors import PluginError
from alignzoo.objective import log_probs_of
from alignzoo.records import TIE

RESERVED = frozenset({
    "loss", "grad_norm", "learning_rate", "num_tokens", "tokens_per_second", "memory", "step", "epoch", "units",
    "padding_fraction", "shared_fraction", "router_loss", "seconds", "skipped_steps",
    "reference/drift", "reference/drift_mean",
})  # fmt: skip
RESERVED_PREFIXES = ("eval_", "rollout/", "rewards/", "logps/", "mean_logps/", "log_ratios/", "kl/", "pairs/", "loss/")


Table = dict[str, dict[str, Any]]


@dataclass
class Accumulator:
    """Means, minima and maxima by name; the tensors stay on their device until `table`."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    extremes: dict[str, tuple[str, Tensor]] = field(default_factory=dict)

    def mean(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Adds values, or those where `where` is True, to a mean."""
        values = values.detach().double()
        if where is None:
            self._add(name, values.sum(), values.new_tensor(values.numel()))
        else:
            self._add(name, values.masked_fill(~where, 0.0).sum(), where.sum().double())

    def share(self, name: str, part: float, whole: float) -> None:
        """Adds to a fraction."""
        self._add(name, torch.tensor(part, dtype=torch.float64), torch.tensor(whole, dtype=torch.float64))

    def _add(self, name: str, total: Tensor, count: Tensor) -> None:
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts[name] + count if name in self.counts else count

    def extreme(self, name: str, metric: Metric) -> None:
        values = metric.values.detach().double()
        if metric.where is not None:
            values = values[metric.where]
        if values.numel():
            self.reach(name, metric.reduce, getattr(values, metric.reduce)())

    def reach(self, name: str, reduce: str, found: Tensor) -> None:
        """Adds a number, (), to an extreme. reduce: "min" or "max"."""
        if name in self.extremes:
            found = getattr(torch.stack([self.extremes[name][1], found]), reduce)()
        self.extremes[name] = (reduce, found)

    def table(self) -> Table:
        """All of it as plain numbers, which other ranks and files can hold."""
        return {
            "sums": {n: v.item() for n, v in self.sums.items()},
            "counts": {n: v.item() for n, v in self.counts.items()},
            "extremes": {n: [reduce, v.item()] for n, (reduce, v) in self.extremes.items()},
        }

    @classmethod
    def merged(cls, tables: Sequence[Table]) -> Accumulator:
        """One over what several ranks collected."""
        whole = cls()
        for table in tables:
            for name, total in table["sums"].items():
                whole.share(name, total, table["counts"][name])
            for name, (reduce, value) in table["extremes"].items():
                whole.reach(name, reduce, torch.tensor(value, dtype=torch.float64))
        return whole

    def result(self) -> dict[str, float]:
        """Plain numbers; a mean over nothing is left out."""
        means = {n: (s / self.counts[n]).item() for n, s in self.sums.items() if self.counts[n].item() > 0}
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():  # of labelled rows; pairs have recorded theirs
            means.setdefault("rewards/margins", means["rewards/chosen"] - means["rewards/rejected"])
        return means | {n: value.item() for n, (_, value) in self.extremes.items()}


def record(into: Accumulator, owner: str, batch: Batch, output: LossOutput) -> None:
    """Everything that is logged of one micro-batch, but the loss itself."""
    sequences = log_probs_of(batch)
    for name, sides in _sides(batch, sequences).items():
        log_probs, where = sides
        into.mean(f"logps/{name}", log_probs.sum(), where)
        into.mean(f"mean_logps/{name}", log_probs.mean(), where)
        if log_probs.reference is not None:
            into.mean(f"kl/{name}", log_probs.log_ratio(), where)
    _record_rewards(into, batch, output)
    for name, value in output.metrics.items():
        if name in RESERVED or name.startswith(RESERVED_PREFIXES):
            raise PluginError(f'loss "{owner}" logs a metric named "{name}", which is alignzoo\'s own', fix="rename it")
        _record_metric(into, name, value)


def _record_metric(into: Accumulator, name: str, value: Tensor | Metric) -> None:
    if isinstance(value, Tensor):
        into.mean(name, value)
    elif value.reduce == "mean":
        into.mean(name, value.values, value.where)
    else:
        into.extreme(name, value)


def _sides(batch: Batch, sequences: Mapping[str, LogProbs]) -> dict[str, tuple[LogProbs, Tensor | None]]:
    """Which completions are logged under which name; labelled rows by their label."""
    if isinstance(batch, Labelled):
        return {"chosen": (batch.completion, batch.label), "rejected": (batch.completion, ~batch.label)}
    return {name: (log_probs, None) for name, log_probs in sequences.items()}


def _record_rewards(into: Accumulator, batch: Batch, output: LossOutput) -> None:
    rewards = output.rewards
    if isinstance(batch, ScoredPairs) and rewards is None:
        rewards = (batch.chosen.score, batch.rejected.score)
    if isinstance(batch, Pairs | ScoredPairs):
        prefix, (chosen, rejected) = ("rewards", rewards) if isinstance(rewards, tuple) else _implicit(batch)  # type: ignore[arg-type]
        if prefix != "mean_logps":  # those are there already
            into.mean(f"{prefix}/chosen", chosen)
            into.mean(f"{prefix}/rejected", rejected)
        _record_margin(into, prefix, chosen.detach() - rejected.detach())
    elif isinstance(rewards, Tensor):
        if isinstance(batch, Labelled):
            into.mean("rewards/chosen", rewards, batch.label)
            into.mean("rewards/rejected", rewards, ~batch.label)
            lead = rewards if output.threshold is None else rewards - output.threshold
            _record_right(into, "rewards", torch.where(batch.label, lead, -lead))
        else:
            into.mean("rewards/completion", rewards)


def record_preference(into: Accumulator, batch: Pairs) -> None:
    """Which side the policy prefers, by log-ratios or, without a reference, by log-probs per token; named pairs/..."""
    _, (chosen, rejected) = _implicit(batch)
    _record_margin(into, "pairs", chosen - rejected)


def _implicit(batch: Pairs) -> tuple[str, tuple[Tensor, Tensor]]:
    """What takes the place of rewards where a loss gives none: log-ratios, or log-probs per token."""
    if batch.chosen.reference is not None:
        return "log_ratios", (batch.chosen.log_ratio(), batch.rejected.log_ratio())
    return "mean_logps", (batch.chosen.mean(), batch.rejected.mean())


def _record_margin(into: Accumulator, prefix: str, margin: Tensor) -> None:
    into.mean(f"{prefix}/margins", margin)
    _record_right(into, prefix, margin)


def _record_right(into: Accumulator, prefix: str, lead: Tensor) -> None:
    """Accuracy and ties. lead: the margin of a pair, or how far the reward of a labelled row is on its own side."""
    tie = lead.abs() <= TIE
    into.mean(f"{prefix}/accuracies", torch.where(tie, 0.5, (lead > 0).double()))
    into.mean(f"{prefix}/ties", tie.double())


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins at the peak of whatever process started this one
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))[0]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
