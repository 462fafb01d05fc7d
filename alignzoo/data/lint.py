"""`alignzoo data lint`: what is wrong, doubtful or worth knowing of data, before anybody trains on it.

Sources are read once, row by row, and once more for the texts of the rows that are named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from alignzoo.data.encode import Pipeline
from alignzoo.data.kinds import converter
from alignzoo.data.language import MISSING
from alignzoo.data.lint_rules import SEVERITIES, Finding, Severity, Thresholds, Worst, findings
from alignzoo.data.lint_scan import CountedBadRows, Scan, Scanned, said
from alignzoo.data.lint_sets import look_across
from alignzoo.data.lint_tokens import TokenScan
from alignzoo.data.reading import read
from alignzoo.data.rows import Example, Tally
from alignzoo.data.selection import times
from alignzoo.data.show import LABELS, names_of, shortened
from alignzoo.data.sources import open_source
from alignzoo.data.watch import Watch
from alignzoo.plugins import Registry
from alignzoo.recipe import Data, Source

_BATCH = 256  # rows that are tokenised at once
_SHOWN = 600  # characters of each text of a row that is named


@dataclass(frozen=True)
class Looked:
    """A source that was looked at."""

    path: str
    held_out: bool
    format: str
    kind: str
    rows: int  # read
    usable: int
    unused: tuple[str, ...]  # columns that nothing reads


@dataclass(frozen=True)
class LintReport:
    """All that was found."""

    sources: tuple[Looked, ...]
    held_out: str  # in words
    tokens: bool  # whether template, tokenizer and lengths of a recipe were looked at
    findings: tuple[Finding, ...]

    def counts(self) -> dict[Severity, int]:
        """How many findings there are of each severity."""
        return {severity: sum(f.severity == severity for f in self.findings) for severity in SEVERITIES}

    def exit_code(self, strict: bool) -> int:
        """1 with an error, and with a warning where `strict`; else 0."""
        counts = self.counts()
        return int(bool(counts["error"] or (strict and counts["warning"])))

    def table(self) -> dict[str, Any]:
        """For JSON."""
        found = [{**dataclasses.asdict(finding), "share": finding.share} for finding in self.findings]
        return {**dataclasses.asdict(self), "findings": found, "counts": self.counts()}


def lint(
    train: Sequence[Source],
    held: Sequence[Source],
    data: Data,
    limits: Thresholds,
    watch: Watch,
    *,
    pipeline: Pipeline | None = None,
    registry: Registry | None = None,
) -> LintReport:
    """Looks at the rows of some sources.

    train, held: what is trained on and what is held out. data: how rows are read. pipeline: of a recipe, to look at the
    tokens too. registry: as for `read`. Raises DataError as `read` does, and for what the template refuses altogether.
    """
    scan = Scan(limits)
    tokens = None if pipeline is None else TokenScan(pipeline, scan.hits)
    looked = []
    for held_out, sources in ((False, train), (True, held)):
        for source in sources:
            looked.append(_look_at(scan, tokens, source, held_out, data, watch, registry))
            watch.close()
    sides, words = _sides(scan, tokens, train, data)
    look_across(scan, sides)
    _say_languages(scan)
    rows = sum(one.rows for one in looked)
    found = findings(scan.hits, rows, limits, skip_bad=pipeline is not None and data.on_bad_row == "skip")
    found = _with_texts(found, [*train, *held], data, registry)
    return LintReport(tuple(looked), words, pipeline is not None, tuple(found))


def _look_at(
    scan: Scan, tokens: TokenScan | None, source: Source, held_out: bool, data: Data, watch: Watch,
    registry: Registry | None,
) -> Looked:  # fmt: skip
    opened, tally = open_source(source), CountedBadRows(hits=scan.hits)
    reading = read(opened, source, data, None, tally, registry)
    scan.sources.append(Scanned(opened.name, held_out))
    kind = reading.format.kind if reading.format else ""
    change = converter(kind, tokens.pipeline.kind, opened.name, reading.columns)[0] if tokens and kind else None
    while batch := list(islice(reading.examples, _BATCH)):
        first = len(scan)
        for example in batch:
            scan.add(example)
        if tokens and change:
            tokens.add(list(enumerate(batch, start=first)), change)
        watch.update(opened.name, tally.read, opened.meter.share)
    for reason, count in tally.dropped.items():
        scan.hits.counts[reason] = scan.hits.counts.get(reason, 0) + count
    name = reading.format.name if reading.format else "unknown"
    return Looked(opened.name, held_out, name, kind, tally.read, tally.examples, reading.unused)


def _sides(
    scan: Scan, tokens: TokenScan | None, train: Sequence[Source], data: Data
) -> tuple[npt.NDArray[np.bool_], str]:
    """Which rows are held out, and in words how they were found."""
    of = scan.column("source")
    held = np.asarray([source.held_out for source in scan.sources], np.bool_)[of]
    if held.any():
        return held, f"{int(held.sum())} rows held out"
    if tokens is None or not data.eval_fraction:
        return held, "nothing is held out, so leaks into held-out rows cannot be looked for"
    counts = np.ones(len(scan), np.int64)
    for i, source in enumerate(train):
        counts[of == i] = times(scan.column("row_key")[of == i], source.weight, source.path)
    held = tokens.held_out(counts, data.eval_fraction)
    return held, f"{int(held.sum())} rows held out by prompt, data.eval_fraction = {data.eval_fraction:g}"


def _say_languages(scan: Scan) -> None:
    total = scan.languages.total()
    if not total:
        return
    known = scan.languages.most_common()
    words = ", ".join(f"{name or 'too short or not clear'} {count / total:.1%}" for name, count in known[:8])
    more = f" and {len(known) - 8} more" if len(known) > 8 else ""
    missing = "" if scan.identifier.known else f" ({MISSING})"
    scan.hits.say("languages", total - scan.languages[""], total, f"{words}{more}{missing}")


# --- the rows that are named


def _with_texts(
    found: Sequence[Finding], sources: Iterable[Source], data: Data, registry: Registry | None
) -> list[Finding]:
    wanted = {row.where for finding in found for row in finding.rows}
    texts: dict[str, dict[str, str]] = {}
    for source in sources:
        if len(texts) == len(wanted):
            break
        for example in read(open_source(source), source, data, None, Tally(), registry).examples:
            if example.where in wanted:
                texts[example.where] = _texts(example)
                if len(texts) == len(wanted):
                    break
    return [replace(f, rows=tuple(Worst(r.where, r.detail, texts.get(r.where, {})) for r in f.rows)) for f in found]


def _texts(example: Example) -> dict[str, str]:
    parts = {"prompt": said(example.prompt)}
    parts |= {name: said(turns) for name, turns in zip(names_of(example), example.completions, strict=True)}
    if example.label is not None:
        parts["label"] = LABELS[example.label]
    return {name: shortened(text, _SHOWN) for name, text in parts.items() if text}
