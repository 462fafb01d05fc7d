"""Rows -> examples: finds the format of a source and converts its rows one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from alignzoo.api import Format
from alignzoo.data.columns import check_keep, check_mapping, numbers, rename
from alignzoo.data.formats import Match, convert, detect
from alignzoo.data.formats_found import named
from alignzoo.data.kinds import choose_turns, converter
from alignzoo.data.rows import BadRow, Dropped, Example, Row, Tally, Turns, bad_rows_error
from alignzoo.data.selection import weight_key
from alignzoo.data.sources import Opened
from alignzoo.data.values import is_unicode
from alignzoo.errors import DataError
from alignzoo.plugins import Registry
from alignzoo.recipe import Data, Source

_PEEK = 32  # readable rows whose columns decide the format
_PEEK_MOST = 10_000  # rows that are tried for that
_PLACEHOLDER = re.compile(r"\{\{ ?[A-Za-z_]\w* ?\}\}|<(?:image|video|audio)>")
_MEDIA = {  # what LLaMA-Factory writes in a text: the columns that hold what is meant
    "<image>": ("images", "image"), "<video>": ("videos", "video"), "<audio>": ("audios", "audio"),
}  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """One source while it is read. `examples` can be gone through once; `tally` counts along."""

    name: str
    examples: Iterator[Example]
    tally: Tally
    format: Format | None = None  # None: not one row could be read
    columns: tuple[str, ...] = ()  # found, under our names
    conversion: str = ""
    unused: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()  # what was taken for granted, in words


@dataclass(frozen=True)
class _Reader:
    """How the rows of one source become examples."""

    mapping: dict[str, str]
    match: Match
    change: Callable[[Example], tuple[Example, ...]]
    keep: tuple[str, ...]
    train_on: str
    prompts: bool  # only prompts are wanted, with the other columns for rewards

    def examples(self, row: Row) -> tuple[Example, ...]:
        """Raises BadRow and Dropped."""
        if row.problem is not None:
            raise row.problem
        try:
            return self._examples(row)
        except RecursionError as error:
            raise BadRow("too-nested") from error

    def _examples(self, row: Row) -> tuple[Example, ...]:
        renamed = rename(row.values, self.mapping) if self.mapping else row.values
        values = self.match.named(renamed)
        example = convert(self.match.format, values)
        drawn = weight_key(example)
        if self.prompts:
            example = replace(example, columns={name: v for name, v in renamed.items() if name != "prompt"})
        elif example.kind == "demonstrations":
            example = choose_turns(example, self.train_on)
        derived = self.match.format.derived
        extra = numbers(derived(values) if derived and self.keep else values, self.keep)
        placeholders = _placeholders(example)
        _refuse_media(placeholders, values)
        notes = (*example.notes, *(f"placeholder: {name}" for name in placeholders))
        return self.change(replace(example, extra=extra, where=row.where, notes=notes, weight_key=drawn))


def read(
    opened: Opened,
    source: Source,
    data: Data,
    kind: str | None = None,
    tally: Tally | None = None,
    registry: Registry | None = None,
) -> Reading:
    """Opens the pipeline of a source.

    kind: what the loss wants, and every example is converted to it; None: as the source holds them. Rows that cannot be
    used are counted in the tally when the examples are drawn. Raises DataError for a source without rows, columns that
    fit no format, a mapped or kept column that is not there, or a kind that cannot be made of it. tally: a new one if
    not given. registry: where a format that the source names is looked for; alignzoo's own if not given.
    """
    tally, name = tally or Tally(), opened.name
    rows = _counted(islice(opened.rows, source.limit), tally)
    first = _peek(rows)
    if not first:
        raise DataError(f"{name}: holds no rows", fix="check the path and the file")
    found = _columns(first)
    if not found:
        return _unreadable(name, first, rows, tally)
    mapping = {**data.columns, **source.columns}
    check_mapping(found, mapping, name)
    columns = list(rename(dict.fromkeys(found), mapping))
    match = detect(columns, named(source, registry), name, [rename(row.values, mapping) for row in first])
    check_keep([*columns, *match.format.adds], data.keep, name)
    known = match.format
    change, conversion = converter(known.kind, kind or known.kind, name, columns)
    reader = _Reader(mapping, match, change, data.keep, data.train_on, "prompts" in (kind, known.kind))
    examples = _examples(chain(first, rows), reader.examples, tally)
    unused = tuple(column for column in columns if column not in (*match.known, *data.keep))
    if "prompts" in (kind, known.kind):
        unused = ()  # rewards may read any column
    return Reading(name, examples, tally, known, tuple(columns), conversion, unused, _remarks(match))


def _remarks(match: Match) -> tuple[str, ...]:
    read_as = [f'column "{theirs}" is read as {ours}' for ours, theirs in match.aliases.items()]
    return ("; ".join(read_as),) if read_as else ()


def _placeholders(example: Example) -> list[str]:
    """{{name}}, <image> and the like, in whose place something else was to stand."""
    found: dict[str, None] = {}
    for part in (example.prompt, *example.completions):
        for text in _texts(part):
            if "{{" in text or "<" in text:
                found.update(dict.fromkeys(_PLACEHOLDER.findall(text)))
    return list(found)


def _refuse_media(placeholders: Sequence[str], values: Mapping[str, Any]) -> None:
    """Raises BadRow where the answer is about an image that the model would not see."""
    for name in placeholders:
        for column in _MEDIA.get(name, ()):
            if values.get(column):
                raise BadRow("media", f'{name} in the text, and the column "{column}": only text is read')


def _texts(turns: Turns) -> list[str]:
    return [turns] if isinstance(turns, str) else [turn["content"] for turn in turns]


def _counted(rows: Iterable[Row], tally: Tally) -> Iterator[Row]:
    for row in rows:
        tally.read += 1
        yield row


def _peek(rows: Iterator[Row]) -> list[Row]:
    """The first rows, as many as are needed to know the columns."""
    first: list[Row] = []
    readable = 0
    for row in islice(rows, _PEEK_MOST):
        first.append(row)
        readable += bool(row.values)
        if readable == _PEEK:
            break
    return first


def _columns(rows: Sequence[Row]) -> list[str]:
    named = (column for row in rows for column in row.values if isinstance(column, str) and is_unicode(column))
    return list(dict.fromkeys(named))


def _unreadable(name: str, first: Sequence[Row], rows: Iterator[Row], tally: Tally) -> Reading:
    """A source of which no row can be read: all are bad. A long one ends here."""
    for row in first:
        tally.add_bad(row.where, row.problem or BadRow("missing-column", "no columns"))
    if next(rows, None) is not None:
        raise bad_rows_error([tally])
    return Reading(name, iter(()), tally)


def _examples(rows: Iterable[Row], convert: Callable[[Row], tuple[Example, ...]], tally: Tally) -> Iterator[Example]:
    for row in rows:
        try:
            found = convert(row)
        except BadRow as problem:
            tally.add_bad(row.where, problem)
            continue
        except Dropped as dropped:
            tally.dropped[dropped.reason] += 1
            continue
        tally.examples += len(found)
        tally.notes.update(note for example in found[:1] for note in example.notes)
        yield from found
