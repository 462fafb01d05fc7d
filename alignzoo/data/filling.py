"""One source into one store: its examples in batches, and the facts that the report is made of."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

from alignzoo.data.encode import Encoded, Pipeline, encode_all
from alignzoo.data.reading import Reading
from alignzoo.data.rows import SHOWN, Example, Tally
from alignzoo.data.sources import Opened
from alignzoo.data.store import StoreWriter
from alignzoo.data.watch import Watch
from alignzoo.errors import DataError

BATCH = 256  # examples that are tokenised at once


class StoppedByBadRows(Exception):
    """data.on_bad_row = "fail", and some rows are bad: the counts are all there is."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.tally = tally


@dataclass(frozen=True)
class Facts:
    """What is known of a source after it was read, whatever its rows are used for."""

    format: str
    kind: str  # as the source holds it
    conversion: str  # in words; "" where the loss wants what the source holds
    unused: tuple[str, ...]  # columns that nothing reads
    remarks: tuple[str, ...]  # what was taken for granted
    tally: Tally  # of all examples; what was cut, and most notes, are marks of the stored rows

    @classmethod
    def of(cls, reading: Reading, tally: Tally) -> Facts:
        known = reading.format
        name, kind = (known.name, known.kind) if known else ("unknown", "unknown")
        return cls(name, kind, reading.conversion if known else "", reading.unused, reading.remarks, tally)

    @property
    def converted(self) -> str:
        """How many examples were made of how many rows, and how; "" where nothing was converted."""
        usable = self.tally.read - self.tally.bad.total()
        return f"{usable} {self.kind} -> {self.tally.examples} examples: {self.conversion}" if self.conversion else ""

    def table(self, name: str) -> dict[str, Any]:
        """As plain values, without the name of the source: the same content may have another one the next time."""
        shown = [line.removeprefix(name) for line in self.tally.shown]
        return {**vars(self), "tally": {**vars(self.tally), "shown": shown}}

    @classmethod
    def from_table(cls, table: Mapping[str, Any], name: str) -> Facts:
        """Of a source that is called `name` this time."""
        values: dict[str, Any] = {k: Counter(v) if isinstance(v, dict) else v for k, v in table["tally"].items()}
        tally = Tally(**{**values, "shown": [name + line for line in values["shown"]]})
        lists = {key: tuple(table[key]) for key in ("unused", "remarks")}
        return cls(**{**table, **lists, "tally": tally})


def fill(
    writer: StoreWriter, pipeline: Pipeline, opened: Opened, reading: Reading, stamp: object, watch: Watch
) -> Facts:
    """Writes all usable rows of a source. stamp: of the source, from before its content was hashed.

    Raises StoppedByBadRows, and DataError as `render` and the reading do.
    """
    name, stops, found = opened.name, pipeline.data.on_bad_row == "fail", Tally()
    with closing(encode_all(pipeline, name, _batches(reading, stops))) as batches:
        for encoded in batches:
            writer.append(encoded.packed)
            _count(found, encoded)
            watch.update(name, reading.tally.read, opened.meter.share)
            if stops and found.bad:
                break
    deque(reading.examples, maxlen=0)  # a run that stops anyway counts the rest of what is bad
    tally = _merged(reading.tally, found, name)
    tally.unseen = tally.examples - found.kept - found.bad.total() - found.dropped.total()
    if stops and tally.bad:
        raise StoppedByBadRows(tally)
    if opened.stamp() != stamp:
        raise DataError(f"{name}: the file was changed while it was read", fix="start again when it is complete")
    return Facts.of(reading, tally)


def _batches(reading: Reading, stops: bool) -> Iterator[list[Example]]:
    while batch := list(islice(reading.examples, BATCH)):
        if stops and reading.tally.bad:
            return
        yield batch


def _count(tally: Tally, encoded: Encoded) -> None:
    for where, problem in encoded.bad:
        tally.add_bad(where, problem)
    tally.dropped += encoded.dropped
    tally.kept += encoded.rows


def _merged(read: Tally, found: Tally, name: str) -> Tally:
    """The counts of reading and encoding, the first bad rows in the order of the source."""
    place = re.compile(re.escape(name) + r"\D*(\d+)")

    def number(line: str) -> int:
        match = place.match(line)
        return int(match[1]) if match else 0

    return dataclasses.replace(
        read,
        kept=found.kept,
        bad=read.bad + found.bad,
        dropped=read.dropped + found.dropped,
        shown=sorted((*read.shown, *found.shown), key=number)[:SHOWN],
    )
