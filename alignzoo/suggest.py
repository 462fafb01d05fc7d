"""`alignzoo suggest`: which of the installed losses fit a data set, and why, by what they declare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignzoo.api import Loss
from alignzoo.data.kinds import CONVERSIONS, SHAPES
from alignzoo.data.reading import read
from alignzoo.data.rows import Example, content_hash
from alignzoo.data.selection import short
from alignzoo.data.sources import open_source
from alignzoo.errors import DataError
from alignzoo.plugin_kinds import LossInfo
from alignzoo.plugins import Registry
from alignzoo.recipe import Data, Source
from alignzoo.schema import rows_of

FEW = 200  # usable rows, below which a held-out part says little
RATIO = (1.0, 1.5)  # desirable times its weight by undesirable times its weight, as Ethayarajh et al. 2024 advise
_FITS = ("yes", "converted", "online", "no")
_JUDGING = ("score", "rating", "reward", "label", "preference", "rejected", "vote", "feedback", "thumb", "quality")


@dataclass(frozen=True)
class Facts:
    """What a data set holds, as far as the choice of a loss goes."""

    name: str
    format: str
    kind: str
    read: int
    usable: int
    prompts: int  # different ones
    asked: int  # rows with a prompt
    longer_chosen: float | None  # part of the pairs whose chosen answer is the longer one
    labels: Mapping[str, int]  # "true" and "false"
    judged_both_ways: int  # prompts with an answer labelled true and one labelled false
    median_answer: int  # characters
    unused: tuple[str, ...]


@dataclass(frozen=True)
class Fit:
    """How a loss fits."""

    loss: str
    fits: str  # yes, converted, online (the prompts answered anew and rewarded) or no
    family: str
    examples: int  # that the loss would see
    why: tuple[str, ...]
    paper: str


@dataclass(frozen=True)
class Suggestion:
    facts: Facts
    remarks: tuple[str, ...]
    losses: tuple[Fit, ...]  # those that fit first

    def table(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def suggest(source: Source, registry: Registry) -> Suggestion:
    """Reads all rows of a source once, and compares it with every installed loss. Raises DataError."""
    facts = _facts(source, registry)
    fits = [_fit(info, facts) for _, info in sorted(registry.losses().items())]
    fits.sort(key=lambda fit: _FITS.index(fit.fits))
    return Suggestion(facts, tuple(_remarks(facts)), tuple(fits))


def _facts(source: Source, registry: Registry) -> Facts:
    reading = read(open_source(source), source, Data(train=source.path, on_bad_row="skip"), registry=registry)
    prompts: set[int] = set()
    judged: dict[bool, set[int]] = {True: set(), False: set()}
    labels: Counter[str] = Counter()
    longer: Counter[int] = Counter()
    lengths: list[int] = []
    asked = 0
    for example in reading.examples:
        key = short(content_hash(example.prompt or example.completions))
        prompts.add(key)
        asked += bool(example.prompt)
        if example.label is not None:
            labels[str(example.label).lower()] += 1
            judged[example.label].add(key)
        sizes = _sizes(example)
        lengths += sizes[:1]
        if len(sizes) == 2:
            longer[int(np.sign(sizes[0] - sizes[1]))] += 1
    if reading.format is None:
        raise DataError("\n    ".join([f"{reading.name}: no row can be read", *reading.tally.shown]))
    differ = longer[1] + longer[-1]
    return Facts(
        reading.name, reading.format.name, reading.format.kind, reading.tally.read, reading.tally.examples,
        len(prompts), asked, longer[1] / differ if differ else None, dict(labels), len(judged[True] & judged[False]),
        int(np.median(lengths)) if lengths else 0, reading.unused,
    )  # fmt: skip


def _sizes(example: Example) -> list[int]:
    """Characters of each answer."""
    return [len(c) if isinstance(c, str) else sum(len(turn["content"]) for turn in c) for c in example.completions]


def _remarks(facts: Facts) -> Iterator[str]:
    """What stands out of the data itself."""
    if facts.usable < facts.read:
        yield f"{facts.read - facts.usable} of {facts.read} rows cannot be used: `alignzoo data lint` names them"
    if facts.usable < FEW:
        yield f"{facts.usable} rows are few: expect to overfit within an epoch or two, and hold enough out to see it"
    if facts.kind == "labelled" and len(facts.labels) == 1:
        yield "all rows have the same label: nothing is told apart"
    if facts.judged_both_ways:
        yield (
            f"{facts.judged_both_ways} prompt(s) have an answer labelled true and one labelled false: pairs could be "
            "made of them (alignzoo makes none of labels)"
        )
    if facts.longer_chosen is not None and abs(facts.longer_chosen - 0.5) > 0.15:
        yield f"the longer answer is chosen in {facts.longer_chosen:.0%} of the pairs: see length-bias in docs/lint.md"
    judging = [column for column in facts.unused if any(word in column.lower() for word in _JUDGING)]
    if judging and facts.kind == "demonstrations":
        yield (
            f"columns that are not used and may judge the answers: {', '.join(judging)}; data.columns can name them as "
            "label, chosen or rejected"
        )


def _fit(info: LossInfo, facts: Facts) -> Fit:
    fits, examples, why = _match(info.cls.data, facts)
    if info.cls.needs_scores:
        why.append('it trains a reward model (model.head = "scalar"), which gives scores and no answers')
        if fits == "online":  # such a model answers nothing
            fits, examples = "no", 0
            why[0] = _wants(info.cls.data, facts)
    if fits in ("yes", "converted"):
        why += _costs(info, facts)
    return Fit(info.name, fits, info.cls.family, examples, tuple(why), info.cls.paper)


def _match(wanted: str, facts: Facts) -> tuple[str, int, list[str]]:
    """Whether a kind of data can be had of what there is, of how many examples, and in words."""
    if facts.kind == wanted:
        return "yes", facts.usable, [f"it eats {wanted}, and that is what the data holds"]
    if (facts.kind, wanted) in CONVERSIONS:
        good = facts.labels.get("true", 0)
        examples = {"labelled": 2 * facts.usable}.get(wanted, good if facts.kind == "labelled" else facts.usable)
        if examples:
            return "converted", examples, [f"{facts.kind} are made into {wanted}: {CONVERSIONS[facts.kind, wanted][1]}"]
    if facts.asked:
        made = f"with [rollout] and [[rewards]]: the model answers the prompts, and {wanted} are made of its answers"
        return "online", facts.asked, [made]
    return "no", 0, [_wants(wanted, facts)]


def _wants(wanted: str, facts: Facts) -> str:
    return f"it wants {wanted} ({SHAPES.get(wanted, wanted)}), and the data holds {facts.kind}"


def _costs(info: LossInfo, facts: Facts) -> list[str]:
    """What the loss needs and offers, by its declarations and the names of its settings."""
    loss = _instance(info)
    settings = {row.name for row in rows_of(info.cls.Settings)}
    said = []
    if loss is not None:
        said.append(
            "it needs the log-probs of a reference: one more pass over the data, once"
            if loss.needs_reference
            else "it needs no reference model"
        )
        if loss.needs_mismatched:
            said.append(_mismatched(facts))
    if "label_smoothing" in settings and facts.kind == "pairs":
        said.append("label_smoothing is for labels that are sometimes wrong")
    if {"desirable_weight", "undesirable_weight"} <= settings:
        said += _weights(facts)
    return said


def _mismatched(facts: Facts) -> str:
    if facts.prompts < 2:
        return "it compares rows with answers to other prompts, and there is but one prompt: a run refuses that"
    return "it also runs answers of other prompts, without gradients, in every step"


def _instance(info: LossInfo) -> Loss | None:
    """The loss with its default settings; None where it has none or fails."""
    with suppress(Exception):
        return info.cls()
    return None


def _weights(facts: Facts) -> list[str]:
    good, bad = (facts.labels.get(key, 0) for key in ("true", "false"))
    if not (good and bad):
        return ["from pairs, both labels have as many rows"] if facts.kind == "pairs" else []
    ratio, (low, high) = good / bad, RATIO
    words = f"{good} desirable and {bad} undesirable rows"
    if low <= ratio <= high:
        return [f"{words}: balanced with weights of 1"]
    key, weight = ("undesirable_weight", ratio) if ratio > high else ("desirable_weight", 1 / ratio)
    return [f"{words}: {key} = {weight:.2g} balances them"]


def print_suggestion(found: Suggestion, console: Console) -> None:
    """The facts in lines, then a row for each loss."""
    facts = found.facts
    lines = [
        f"{facts.name}: {facts.usable} of {facts.read} rows usable, format {facts.format}, kind {facts.kind}",
        f"{facts.prompts} different prompts, median answer {facts.median_answer} characters",
        *([", ".join(f"{n} labelled {label}" for label, n in facts.labels.items())] if facts.labels else []),
        *found.remarks,
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    table = Table(show_lines=True)
    for name in ("loss", "fits", "examples"):
        table.add_column(name, no_wrap=True)
    table.add_column("why", overflow="fold")
    others: dict[str, list[str]] = {}
    for fit in found.losses:
        if fit.fits in ("yes", "converted"):
            table.add_row(*map(Text, (fit.loss, fit.fits, str(fit.examples), "\n".join([*fit.why, fit.paper]).strip())))
        else:
            others.setdefault(f"{fit.fits}, {'; '.join(fit.why)}", []).append(fit.loss)
    if table.rows:
        console.print(table)
    for why, names in others.items():
        console.print(f"{', '.join(names)}: {why}", markup=False, highlight=False, soft_wrap=True)
    words = "what the losses differ in, with sources: docs/choosing.md; faults of the data: alignzoo data lint"
    console.print(words, markup=False, highlight=False, soft_wrap=True)
