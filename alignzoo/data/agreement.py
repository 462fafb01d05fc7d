"""`alignzoo data agreement`: how far annotators agree, how often they are right, and who cannot have read the rows.

Cohen's kappa (Cohen 1960) is scikit-learn's, of the optional extra `agreement`: the share of equal answers, corrected
for those that chance would give. Landis and Koch 1977 call 0.61 to 0.8 substantial; below 0.6 is a warning here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

from alignzoo.data.rows import Row, content_hash
from alignzoo.data.sources import open_source
from alignzoo.errors import DataError
from alignzoo.recipe import Source
from alignzoo.schema import nearest

LEAST_KAPPA = 0.6
FASTEST = 1000.0  # words a minute; adults read about 240 silently (Brysbaert 2019)
_DENSE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")  # scripts without spaces: two characters count as a word
_SHOWN = 10


@dataclass(frozen=True)
class Columns:
    """What the columns of the file are called."""

    gold: str = "gold"
    label: str = "label"  # with a row for each answer
    annotator: str = "annotator"
    item: str = "id"
    seconds: str = "seconds"  # and NAME_seconds, with a column for each annotator


@dataclass(frozen=True)
class Answer:
    """What an annotator said about an item."""

    where: str
    label: str
    seconds: float | None = None


@dataclass
class Answers:
    """All answers of a file, by annotator and item."""

    by: dict[str, dict[str, Answer]]
    gold: dict[str, str] = field(default_factory=dict)
    words: dict[str, int] = field(default_factory=dict)  # to be read, of each item
    again: int = 0  # rows that answer an item for the second time; the first answer counts


@dataclass(frozen=True)
class Pair:
    """Two annotators compared."""

    a: str
    b: str
    items: int  # that both answered
    agreement: float  # share of equal answers
    kappa: float | None  # None: not defined, since both gave but one label
    disagreements: tuple[str, ...]  # the first, in words

    @property
    def low(self) -> bool:
        return self.kappa is not None and self.kappa < LEAST_KAPPA


@dataclass(frozen=True)
class Annotator:
    """One annotator."""

    name: str
    answers: int
    labels: Mapping[str, int]
    gold: int  # answers on gold rows
    right: int  # of these
    timed: int  # answers with a time
    fast: int  # of these, those that are too fast to have read the row
    fastest: tuple[str, ...]  # the worst, in words


@dataclass(frozen=True)
class AgreementReport:
    pairs: tuple[Pair, ...]
    annotators: tuple[Annotator, ...]
    again: int
    words_per_minute: float

    @property
    def warnings(self) -> list[str]:
        """Whatever somebody should look at."""
        low = [f"kappa of {p.a} and {p.b} is {p.kappa:.2f}, below {LEAST_KAPPA}" for p in self.pairs if p.low]
        unknown = [f"kappa of {p.a} and {p.b} is not defined: both gave one label alone" for p in self.pairs
                   if p.kappa is None]  # fmt: skip
        fast = [
            f"{a.name} answered {a.fast} of {a.timed} rows faster than {self.words_per_minute:g} words a minute"
            for a in self.annotators
            if a.fast
        ]
        again = [f"{self.again} rows answer an item again: the first answer counts"] if self.again else []
        return [*low, *unknown, *fast, *again]

    def table(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "warnings": self.warnings}


def agreement(source: Source, names: Sequence[str], columns: Columns, words_per_minute: float) -> AgreementReport:
    """The answers of a file compared.

    names: of the annotators: columns of the file, or values of its column `columns.annotator`. words_per_minute: an
    answer that took less time than reading the row at this speed is implausibly fast. Raises DataError.
    """
    answers = _read(source, names, columns)
    pairs = tuple(_pair(answers, a, b) for a, b in combinations(names, 2))
    people = tuple(_annotator(answers, name, words_per_minute) for name in names)
    return AgreementReport(pairs, people, answers.again, words_per_minute)


# --- reading


def _read(source: Source, names: Sequence[str], columns: Columns) -> Answers:
    opened = open_source(source)
    rows = list(_usable(opened.rows))
    if not rows:
        raise DataError(f"{opened.name}: holds no rows", fix="check the path and the file")
    found = list(dict.fromkeys(column for row in rows for column in row.values))
    wide = [name for name in names if name in found]
    long = {columns.annotator, columns.label} <= set(found)
    if len(wide) < len(names) and (wide or not long):
        missing = next(name for name in names if name not in found)
        raise DataError(
            f'{opened.name}: no column "{missing}"{nearest(missing, found)}',
            why=f"the columns are {', '.join(found)}",
            fix=f"name the columns of the annotators in --annotators, or give a row for each answer, with the columns "
            f"{columns.annotator} and {columns.label} (--annotator-column, --label-column)",
        )
    answers = _wide(rows, names, columns) if wide else _long(rows, names, columns)
    silent = [name for name in names if not answers.by[name]]
    if silent:
        raise DataError(f"{opened.name}: no answer of {', '.join(silent)}")
    return answers


def _usable(rows: Iterable[Row]) -> Iterable[Row]:
    for row in rows:
        if row.problem is not None:
            raise DataError(f"{row.where}: {row.problem.text}")
        yield row


def _wide(rows: Sequence[Row], names: Sequence[str], columns: Columns) -> Answers:
    """A row for each item, a column for each annotator."""
    answers = Answers({name: {} for name in names})
    own = {*names, columns.gold, *(f"{name}_{columns.seconds}" for name in names)}
    for row in rows:
        for name in names:
            label = _label(row.values.get(name))
            if label:
                seconds = _seconds(row, f"{name}_{columns.seconds}")
                answers.by[name][row.where] = Answer(row.where, label, seconds)
        _note_item(answers, row.where, row, own, columns)
    return answers


def _long(rows: Sequence[Row], names: Sequence[str], columns: Columns) -> Answers:
    """A row for each answer. Rows with the same columns.item, or else the same text, are of one item."""
    answers = Answers({name: {} for name in names})
    own = {columns.annotator, columns.label, columns.seconds, columns.gold, columns.item}
    for row in rows:
        name, label = str(row.values.get(columns.annotator)), _label(row.values.get(columns.label))
        shown = {key: value for key, value in row.values.items() if key not in own}
        identity = row.values.get(columns.item)
        item = str(identity) if identity is not None else content_hash(shown).hex()
        _note_item(answers, item, row, own, columns)
        if name in answers.by and label:
            if item in answers.by[name]:
                answers.again += 1
            else:
                answers.by[name][item] = Answer(row.where, label, _seconds(row, columns.seconds))
    return answers


def _note_item(answers: Answers, item: str, row: Row, own: set[str], columns: Columns) -> None:
    gold = _label(row.values.get(columns.gold))
    if gold:
        answers.gold[item] = gold
    answers.words[item] = sum(_words(value) for key, value in row.values.items() if key not in own)


def _label(found: Any) -> str:
    """A label as text; "" where there is none."""
    return "" if found is None else str(found).strip().lower()


def _seconds(row: Row, column: str) -> float | None:
    found = row.values.get(column)
    if found is None or found == "":
        return None
    try:
        return float(found)
    except (TypeError, ValueError) as error:
        raise DataError(f'{row.where}: column "{column}" is {found!r}, not a number of seconds') from error


def _words(value: Any) -> int:
    """Words in all texts of a value, which may be lists of messages."""
    if isinstance(value, str):
        return len(value.split()) + len(_DENSE.findall(value)) // 2
    if isinstance(value, Mapping):
        return sum(map(_words, value.values()))
    return sum(map(_words, value)) if isinstance(value, list | tuple) else 0


# --- comparing


def _pair(answers: Answers, a: str, b: str) -> Pair:
    first, second = answers.by[a], answers.by[b]
    both = [item for item in first if item in second]
    if not both:
        raise DataError(f"{a} and {b} have answered no row in common", why="there is nothing to compare")
    labels = [[side[item].label for item in both] for side in (first, second)]
    unequal = [item for item in both if first[item].label != second[item].label]
    different = [f"{first[i].where}: {a} {first[i].label}, {b} {second[i].label}" for i in unequal]
    kappa = None if len(set(labels[0] + labels[1])) == 1 else _kappa(*labels)
    return Pair(a, b, len(both), 1 - len(different) / len(both), kappa, tuple(different[:_SHOWN]))


def _kappa(a: Sequence[str], b: Sequence[str]) -> float:
    try:
        from sklearn.metrics import cohen_kappa_score
    except ImportError as error:
        raise DataError(
            "Cohen's kappa needs scikit-learn, which is not installed", fix="pip install 'alignzoo[agreement]'"
        ) from error
    return float(cohen_kappa_score(a, b))


def _annotator(answers: Answers, name: str, words_per_minute: float) -> Annotator:
    own = answers.by[name]
    judged = [item for item in own if item in answers.gold]
    timed = [(item, answer) for item, answer in own.items() if answer.seconds is not None]
    fast = [
        (float(answer.seconds or 0) / needed, answer, answers.words[item])
        for item, answer in timed
        if (needed := 60 * answers.words[item] / words_per_minute) > float(answer.seconds or 0)
    ]
    worst = sorted(fast, key=lambda one: one[0])[:_SHOWN]
    return Annotator(
        name,
        len(own),
        dict(Counter(answer.label for answer in own.values()).most_common()),
        len(judged),
        sum(own[item].label == answers.gold[item] for item in judged),
        len(timed),
        len(fast),
        tuple(f"{answer.where}: {words} words in {answer.seconds:g} s" for _, answer, words in worst),
    )
