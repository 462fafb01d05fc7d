"""What data preparation did: counts by reason, conversions, lengths, warnings. For the terminal and the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from alignzoo.data.rows import REASONS
from alignzoo.data.store import Numbers, Trees


@dataclass(frozen=True)
class Lengths:
    """Tokens, over rows."""

    min: int
    median: int
    p95: int
    max: int

    @classmethod
    def of(cls, lengths: Numbers) -> Lengths:
        low, median, p95, high = np.percentile(lengths, (0, 50, 95, 100), method="higher")
        return cls(int(low), int(median), int(p95), int(high))

    def __str__(self) -> str:
        return f"min {self.min}, median {self.median}, 95 % up to {self.p95}, max {self.max}"


@dataclass(frozen=True)
class SourceReport:
    """One file, folder, hub data set or live object."""

    role: str  # train or eval
    path: str
    format: str
    kind: str  # as the source holds it
    rows: int  # read, after limit
    kept: int  # examples that are used, each counted once
    counted: int  # the same under the source's weight
    dropped: Mapping[str, int]  # by reason: bad rows that were left out, and what did not fit the limits
    cut: Mapping[str, int]  # by reason
    conversion: str  # "" where the loss wants what the source holds
    unused: tuple[str, ...]  # columns of the file that nothing reads
    sha256: str  # of the file content; of a hub data set the fingerprint
    said: tuple[str, ...] = ()  # what was taken for granted, and what is worth knowing of the rows

    def lines(self) -> list[str]:
        weighted = f", counted as {self.counted}" if self.counted != self.kept else ""
        lines = [f"{self.role}: {self.path}: {self.rows} rows of format {self.format}, {self.kept} kept{weighted}"]
        if self.conversion:
            lines.append(f"  {self.conversion}")
        lines += [f"  {line}" for line in self.said]
        lines += [f"  dropped {n}: {REASONS[reason]} [{reason}]" for reason, n in self.dropped.items()]
        lines += [f"  cut {n}: {REASONS[reason]} [{reason}]" for reason, n in self.cut.items()]
        if self.unused:
            lines.append(f"  columns not used: {', '.join(self.unused)}")
        return lines


@dataclass(frozen=True)
class Report:
    """The whole of it."""

    sources: tuple[SourceReport, ...]
    template: str
    train_rows: int
    eval_rows: int
    held_out: str  # how the held-out rows were found, in words
    lengths: Mapping[str, Lengths]  # "prompt" and "completion", over training and held-out rows
    cut: Mapping[str, int]  # by reason: mismatched completions
    warnings: tuple[str, ...]

    @property
    def conversions(self) -> tuple[str, ...]:
        """One line for each source whose kind was changed."""
        return tuple(f"{source.path}: {source.conversion}" for source in self.sources if source.conversion)

    def lines(self) -> list[str]:
        """The report in lines, for the terminal."""
        lines = [line for source in self.sources for line in source.lines()]
        held = f"{self.eval_rows} held out" if self.eval_rows else "none held out"
        lines.append(f"rows: {self.train_rows} to train, {held} ({self.held_out})")
        lines.append(f"template: {self.template}")
        lines += [f"{name} tokens: {lengths}" for name, lengths in self.lengths.items()]
        lines += [f"cut {n}: {REASONS[reason]} [{reason}]" for reason, n in self.cut.items()]
        return lines + [f"warning: {warning}" for warning in self.warnings]


def lengths_of(*views: Trees) -> dict[str, Lengths]:
    """Statistics of the prompts and of all completions of all rows."""
    found = {
        "prompt": np.concatenate([trees.prompt_lengths for trees in views]),
        "completion": np.concatenate([trees.completion_lengths for trees in views]),
    }
    return {name: Lengths.of(lengths) for name, lengths in found.items() if len(lengths)}
