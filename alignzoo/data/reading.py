"""Rows -> examples: finds the format of a source and converts its rows one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

from alignzoo.data import formats
from alignzoo.data.kinds import converter
from alignzoo.data.rows import BadRow, Example, Row, Tally, bad_rows_error
from alignzoo.data.sources import Opened
from alignzoo.errors import DataError
from alignzoo.recipe import Data, Source

_PEEK = 32  # readable rows whose columns decide the format
_PEEK_MOST = 10_000  # rows that are tried for that


@dataclass(frozen=True)
class Reading:
    """One source while it is read. `examples` can be gone through once; `tally` counts along."""

    name: str
    examples: Iterator[Example]
    tally: Tally
    format: formats.Format | None = None  # None: not one row could be read
    columns: tuple[str, ...] = ()  # found, under our names
    conversion: str = ""
    unused: tuple[str, ...] = ()


def read(opened: Opened, source: Source, data: Data, kind: str | None = None) -> Reading:
    """Opens the pipeline of a source.

    kind: what the loss wants, and every example is converted to it; None: as the source holds them. Rows that cannot be
    used are counted in the tally when the examples are drawn. Raises DataError for a source without rows, columns that
    fit no format, a mapped or kept column that is not there, or a kind that cannot be made of it.
    """
    tally, name = Tally(), opened.name
    rows = _counted(islice(opened.rows, source.limit), tally)
    first = _peek(rows)
    if not first:
        raise DataError(f"{name}: holds no rows", fix="check the path and the file")
    found = _columns(first)
    if not found:
        return _unreadable(name, first, rows, tally)
    mapping = {**data.columns, **source.columns}
    formats.check_mapping(found, mapping, name)
    columns = list(formats.rename(dict.fromkeys(found), mapping))
    known = formats.detect(columns, source.format, name)
    formats.check_keep(columns, data.keep, name)
    change, conversion = converter(known.kind, kind or known.kind, name)

    def convert(row: Row) -> tuple[Example, ...]:
        if row.problem is not None:
            raise row.problem
        values = formats.rename(row.values, mapping) if mapping else row.values
        example = replace(known.convert(values), extra=formats.numbers(values, data.keep), where=row.where)
        return change(example)

    examples = _examples(chain(first, rows), convert, tally)
    unused = tuple(column for column in columns if column not in (*known.columns, *data.keep))
    return Reading(name, examples, tally, known, tuple(columns), conversion, unused)


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
    named = (column for row in rows for column in row.values if isinstance(column, str) and formats.is_unicode(column))
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
        tally.examples += len(found)
        yield from found
