"""Token trees in flat arrays on disk: written batch by batch, read one at a time, never all in memory.

A store is a folder with one file of little-endian numbers for each column of COLUMNS, and meta.json, which says how
long each file is and what its checksum is. The small columns are memory-mapped; ids and texts are read where they lie.
"""

from __future__ import annotations

import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
import numpy.typing as npt

from alignzoo.errors import DataError
from alignzoo.tree import Completion, Ids, Mask, Tree

Column = npt.NDArray[Any]
Numbers = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

COLUMNS: dict[str, str] = {
    # of each row
    "tokens_end": "<i8",  # where its entries of "tokens" end
    "text_end": "<i8",  # where its bytes of "text" end
    "completions_end": "<i8",  # where its entries of "lengths" end
    "label": "<i1",  # 1, 0, or -1 for none
    "marks": "<u4",  # one bit for each name in meta.json's "marks": what was cut, what is worth a warning
    "prompt": "<i4",  # tokens of the prompt
    "total": "<i4",  # tokens of the prompt and of all completions
    "longest": "<i4",  # tokens of the longest completion
    "own": "<i4",  # tokens of the first completion that count
    "highest": "<i4",  # the highest token id
    "prompt_key": "<u8",  # hashes, see selection.py
    "ids_key": "<u8",
    "held_key": "<u8",
    "weight_key": "<u8",
    "ring_key": "<u8",
    # of each completion
    "lengths": "<i4",
    # of each row its prompt, its completions and, where some tokens do not count, a bit for each token of those
    "tokens": "<i4",
    # of each row a JSON list: its place in the source, what was asked last, its extra columns; of prompts also all that
    # was asked, and the other columns; of groups their rewards
    "text": "<u1",
}
_ENDS = {"tokens_end": "tokens", "text_end": "text", "completions_end": "lengths"}
_READ_IN_PLACE = ("tokens", "text")
_META = "meta.json"
_CHUNK = 1 << 20


class Damaged(Exception):
    """A store whose files are not what its meta.json says; the text tells what is wrong."""


@dataclass(frozen=True)
class Packed:
    """A batch of rows as columns. The ends are counted from the start of the batch."""

    columns: Mapping[str, Column]
    marks: Sequence[tuple[str, ...]]  # of each row


def packed_mask(completions: Sequence[Completion]) -> Ids:
    """A bit for each token of all completions, in 32-bit words; no words where all of them count."""
    if all(completion.mask is None for completion in completions):
        return np.empty(0, np.int32)
    whole = np.concatenate([np.ones(len(c.ids), np.bool_) if c.mask is None else c.mask for c in completions])
    bits = np.packbits(whole)
    return np.pad(bits, (0, -len(bits) % 4)).view(np.int32)


class StoreWriter:
    """Writes a store into an empty folder. Raises DataError where that is not possible."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = 0
        with self._writing():
            self._files: dict[str, IO[bytes]] = {name: (folder / f"{name}.bin").open("wb") for name in COLUMNS}
        self._sums = dict.fromkeys(COLUMNS, 0)
        self._counts = dict.fromkeys(COLUMNS, 0)
        self._marks: dict[str, int] = {}

    def append(self, packed: Packed) -> None:
        """The rows of a batch after those that are there."""
        counts = dict(self._counts)  # before this batch: what its ends are counted from
        marks = [sum(1 << self._marks.setdefault(name, len(self._marks)) for name in names) for names in packed.marks]
        assert len(self._marks) <= 32  # bits of the column
        for name, values in {**packed.columns, "marks": np.asarray(marks, np.uint32)}.items():
            shifted = values + counts[_ENDS[name]] if name in _ENDS else values
            content = np.ascontiguousarray(shifted, COLUMNS[name]).tobytes()
            with self._writing():
                self._files[name].write(content)
            self._sums[name] = zlib.crc32(content, self._sums[name])
            self._counts[name] += len(values)
        self.rows += len(marks)

    def close(self) -> None:
        """Closes the files of a store that is given up, too."""
        with self._writing():
            for file in self._files.values():
                file.close()

    def finish(self, key: str, facts: Mapping[str, Any]) -> None:
        """Writes meta.json, without which the folder is no store. facts: anything that JSON holds."""
        self.close()
        files = {name: [self._counts[name], self._sums[name]] for name in COLUMNS}
        meta = {"key": key, "rows": self.rows, "marks": list(self._marks), "files": files, "facts": facts}
        text = json.dumps({"meta": meta, "sum": _sum_of(meta)})
        with self._writing():
            (self.folder / _META).write_text(text, encoding="utf-8")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self.folder}: prepared data cannot be written",
                why=str(error),
                fix="free space there, or let ALIGNZOO_CACHE (without a cache: TMPDIR) name a folder with more",
            ) from error


def _sum_of(meta: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


class Store:
    """The trees of one source. It stays readable where its folder is renamed or removed in the meantime."""

    def __init__(self, folder: Path, name: str, *, key: str | None = None) -> None:
        """name: of the source, as messages name it. With `key` every byte is checked: raises Damaged, and OSError."""
        self.name = name
        meta = _read_meta(folder)
        if key is not None:
            _check(folder, meta, key)
        self.facts: dict[str, Any] = meta["facts"]
        self.marks: list[str] = meta["marks"]
        self._length: int = meta["rows"]
        self._columns = {c: _mapped(folder / f"{c}.bin", c) for c in COLUMNS if c not in _READ_IN_PLACE}
        self._files = {c: (folder / f"{c}.bin").open("rb", buffering=0) for c in _READ_IN_PLACE}

    def __len__(self) -> int:
        return self._length

    def column(self, name: str) -> Column:
        """The values of a column, one for each row, or each completion for "lengths"."""
        return self._columns[name]

    def marked(self, mark: str) -> Mask:
        """Which rows have a mark, (rows,)."""
        if mark not in self.marks:
            return np.zeros(len(self), np.bool_)
        return np.asarray(self._columns["marks"] & np.uint32(1 << self.marks.index(mark)), np.bool_)

    def tree(self, index: int, row: int, mismatched: Completion | None = None) -> Tree:
        """The tree of a stored row, under its number in the data set."""
        place, _, extra, *whole = self._texts(index)
        asked, columns = whole if len(whole) == 2 else ("", {})
        rewards = tuple(whole[0]) if len(whole) == 1 else None
        label = int(self._columns["label"][index])
        prompt, completions = self._tokens(index)
        return Tree(
            row, prompt, completions, self.name + place, None if label < 0 else bool(label), rewards,
            extra=extra, mismatched=mismatched, asked=asked, columns=columns,
        )  # fmt: skip

    def own(self, index: int) -> Ids:
        """The first completion of a row, without the tokens that belong to its prompt."""
        completion = self._tokens(index)[1][0]
        return completion.ids if completion.mask is None else completion.ids[completion.mask]

    def where(self, index: int) -> str:
        """Source and place of a row."""
        return self.name + str(self._texts(index)[0])

    def asked(self, index: int) -> str:
        """The last turn of a row's prompt, for people to read."""
        return str(self._texts(index)[1])

    def _tokens(self, index: int) -> tuple[Ids, tuple[Completion, ...]]:
        first, last = self._span("completions_end", index)
        lengths: list[int] = self._columns["lengths"][first:last].tolist()
        entries = self._read("tokens", *self._span("tokens_end", index))
        end = start = int(self._columns["prompt"][index])
        completions = []
        mask = _unpacked(entries[start + sum(lengths) :], sum(lengths))
        for n in lengths:
            own = None if mask is None else mask[end - start : end - start + n]
            completions.append(Completion(entries[end : end + n], None if own is None or own.all() else own))
            end += n
        return entries[:start], tuple(completions)

    def _texts(self, index: int) -> list[Any]:
        found: list[Any] = json.loads(self._read("text", *self._span("text_end", index)).tobytes())
        return found

    def _span(self, ends: str, index: int) -> tuple[int, int]:
        column = self._columns[ends]
        return (int(column[index - 1]) if index else 0), int(column[index])

    def _read(self, name: str, start: int, stop: int) -> Column:
        """Some entries of a column, read and not mapped: what was read does not stay in the memory of the process."""
        entries = np.empty(stop - start, np.dtype(COLUMNS[name]))
        if os.preadv(self._files[name].fileno(), [entries.data], start * entries.itemsize) != entries.nbytes:
            raise DataError(
                f"{self.name}: the prepared data on disk is shorter than it was", fix="start again: it is made anew"
            )
        return entries


def _unpacked(words: Ids, n: int) -> Mask | None:
    return np.unpackbits(words.view(np.uint8), count=n).view(np.bool_) if len(words) else None


def _mapped(path: Path, name: str) -> Column:
    dtype = np.dtype(COLUMNS[name])
    if not path.stat().st_size:  # nothing can be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / _META).read_text(encoding="utf-8"))
        meta: dict[str, Any] = content["meta"]
        if content["sum"] != _sum_of(meta):
            raise Damaged(f"{_META} has another checksum than when it was written")
    except (ValueError, KeyError, TypeError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise Damaged(f"{_META} cannot be read") from error
    return meta


def rows_of(folder: Path) -> int:
    """The rows of a store, without looking at them; 0 of a damaged one."""
    try:
        return int(_read_meta(folder)["rows"])
    except (Damaged, OSError, KeyError):
        return 0


def _check(folder: Path, meta: Mapping[str, Any], key: str) -> None:
    if meta["key"] != key:
        raise Damaged("it was made from something else")
    for name, dtype in COLUMNS.items():
        path, (count, expected) = folder / f"{name}.bin", meta["files"][name]
        if not path.is_file() or path.stat().st_size != count * np.dtype(dtype).itemsize:
            raise Damaged(f"{path.name} has another size than when it was written")
        if _file_sum(path) != expected:
            raise Damaged(f"{path.name} has another checksum than when it was written")


def _file_sum(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found = zlib.crc32(chunk, found)
    return found


# --- views


class _Asked(Sequence[str]):
    """The texts of Trees.asked, read one by one."""

    def __init__(self, trees: Trees) -> None:
        self._trees = trees

    def __len__(self) -> int:
        return len(self._trees)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._trees.stored(index, Store.asked)


class Trees(Sequence[Tree]):
    """Rows of one or several stores, in any order and as often as wanted, numbered from 0. A tree is built on access.

    Rows of all stores are counted through: the first row of the second store follows the last one of the first.
    """

    def __init__(
        self, stores: Sequence[Store], rows: Numbers, partners: Numbers | None = None, max_length: int = 0
    ) -> None:
        """partners: for each of `rows` the row whose first completion is its mismatched one, cut to fit max_length."""
        self._stores, self._rows, self._partners, self._max_length = tuple(stores), rows, partners, max_length
        self._starts = np.cumsum([0, *map(len, self._stores)]).tolist()

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Tree: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tree]: ...
    def __getitem__(self, index: int | slice) -> Tree | list[Tree]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]  # counts from the end, and raises IndexError, as lists do
        store, place = self._find(self._rows[row])
        return store.tree(place, row, None if self._partners is None else self._mismatched(row, store, place))

    def _find(self, row: int) -> tuple[Store, int]:
        number = bisect_right(self._starts, row) - 1
        return self._stores[number], int(row) - self._starts[number]

    def _mismatched(self, row: int, store: Store, place: int) -> Completion:
        assert self._partners is not None
        other, there = self._find(self._partners[row])
        return Completion(other.own(there)[: self._max_length - int(store.column("prompt")[place])])

    def chosen(self, rows: Numbers) -> Trees:
        """Some of the rows, (r,), numbered anew."""
        partners = None if self._partners is None else self._partners[rows]
        return Trees(self._stores, self._rows[rows], partners, self._max_length)

    def stored(self, index: int, read: Callable[[Store, int], str]) -> str:
        """What a method of Store says of a row."""
        return read(*self._find(self._rows[range(len(self))[index]]))

    @property
    def asked(self) -> Sequence[str]:
        """The last turn of each row's prompt, for people to read."""
        return _Asked(self)

    # Facts of all rows, from the columns: no tree is built for them.

    def column(self, name: str) -> Column:
        """A column of COLUMNS that has one value for each row, (rows,)."""
        return joined(self._stores, name)[self._rows]

    @cached_property
    def highest_token(self) -> int:
        """The highest token id of all rows, -1 where there are none."""
        return int(self.column("highest").max(initial=-1))

    @cached_property
    def shortest(self) -> int:
        """The number of the first row with the fewest tokens."""
        return int(self.column("total").argmin())

    @cached_property
    def prompt_lengths(self) -> Numbers:
        """Tokens of each prompt, (rows,)."""
        return self.column("prompt").astype(np.int64)

    @cached_property
    def completions(self) -> Numbers:
        """How many completions each row has, (rows,)."""
        counts = [np.diff(store.column("completions_end"), prepend=0) for store in self._stores]
        return _concatenated(counts, np.int64)[self._rows]

    @cached_property
    def completion_lengths(self) -> Numbers:
        """Tokens of all completions, row after row, (sum of completions,)."""
        lengths = joined(self._stores, "lengths").astype(np.int64)
        counts = _concatenated([np.diff(s.column("completions_end"), prepend=0) for s in self._stores], np.int64)
        starts, n = (np.cumsum(counts) - counts)[self._rows], self.completions
        within = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        return np.asarray(lengths[np.repeat(starts, n) + within])

    @cached_property
    def positions(self) -> Numbers:
        """Positions that each row forwards where it runs alone, its mismatched completion apart, (rows,)."""
        return np.asarray(self.completions * (self.prompt_lengths + self.column("longest")))

    def packed_positions(self, shared: bool) -> Numbers:
        """The same without padding; shared: with its prompt once for all its completions, (rows,)."""
        repeated = 0 if shared else self.prompt_lengths * (self.completions - 1)
        return np.asarray(self.column("total").astype(np.int64) + repeated)


def joined(stores: Iterable[Store], name: str) -> Column:
    """A column of several stores as one."""
    return _concatenated([store.column(name) for store in stores], np.dtype(COLUMNS[name]))


def _concatenated(parts: Sequence[Column], dtype: npt.DTypeLike) -> Column:
    return np.concatenate([np.empty(0, dtype), *parts])
