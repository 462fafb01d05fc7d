"""Sources of rows: files, folders saved by `datasets`, the hub, live Python objects. All are read lazily, once.

No file but parquet is in memory as a whole, and of that one row group; arrays of JSON are read piece by piece too.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any, cast

from alignzoo.data.json_array import JsonArray
from alignzoo.data.rows import BadRow, Row, content_hash, describe
from alignzoo.errors import DataError
from alignzoo.recipe import Source

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FILE_ENDINGS = {
    ".txt", ".tsv", ".gz", ".zip", ".zst", ".arrow", ".xlsx", ".yaml", ".yml", ".toml", ".md", ".ndjson"
}  # fmt: skip


class Meter:
    """How much of a source was read."""

    def __init__(self) -> None:
        self.done: Callable[[], float] = lambda: 0.0
        self.whole = 0.0  # 0: not known

    @property
    def share(self) -> float | None:
        """From 0 to 1, None where it is not known."""
        try:
            return min(self.done() / self.whole, 1.0) if self.whole else None
        except ValueError:  # the file is closed
            return 1.0

    def follow(self, file: IO[bytes], size: int) -> None:
        """Takes the place in an open file for what was read."""
        self.done, self.whole = file.tell, size

    def count(self, values: Iterable[Any], whole: int) -> Iterator[Any]:
        """Takes the number of values for what was read."""
        number = 0
        self.done, self.whole = lambda: number, whole
        for value in values:
            yield value
            number += 1


@dataclass(frozen=True)
class Opened:
    """A source that was found. `rows` can be gone through once."""

    name: str  # as messages name it
    rows: Iterator[Row]
    digest: Callable[[], str]  # sha256 of the content, or the fingerprint that `datasets` gave it
    reader: str = ""  # what turns the content into rows; "": the content is not known before it was read
    stamp: Callable[[], object] = lambda: None  # another value where the content was changed in the meantime
    meter: Meter = field(default_factory=Meter, compare=False)


def open_source(source: Source) -> Opened:
    """The rows of a recipe's source. Raises DataError where there is none, or it cannot be read."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _saved(path, source.split)
    reader = _READERS.get(_ending(path))
    if path.exists():
        if reader is None:
            raise DataError(f"{display(path)}: cannot read files with this ending", why=f"known are {_known_endings()}")
        if source.split is not None:
            raise DataError(f'{display(path)}: a file has no split "{source.split}"', fix="leave split out")
        return _file(path, reader)
    if reader is None and _HUB_ID.fullmatch(source.path) and path.suffix.lower() not in _FILE_ENDINGS:
        return _hub(source.path, source.split)
    raise _missing(path)


def _file(path: Path, reader: Reader) -> Opened:
    name, meter = display(path), Meter()
    how = f"{reader.__name__}{' gzip' if _is_gzip(path) else ''}"
    rows = _guarded(name, reader(path, meter))
    return Opened(name, rows, cache(lambda: _file_digest(path)), how, lambda: _file_stamp(path), meter)


def open_live(rows: Any, role: str) -> Opened:
    """The rows of a list of dictionaries, a datasets.Dataset or anything else that yields dictionaries.

    role: "train" or "eval", how messages name it.
    """
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise DataError(
            f"{role} = {describe(rows)} is no data set",
            fix="give a list of dictionaries or one split of a data set; a path belongs into the recipe",
        )
    digest, meter = hashlib.sha256(), Meter()

    def read() -> Iterator[Row]:
        counted = meter.count(rows, len(rows) if isinstance(rows, Sized) else 0)
        for number, values in enumerate(counted, start=1):
            if not fingerprint:
                digest.update(content_hash(values))
            yield _row(f"{role} row {number}", values)

    fingerprint = getattr(rows, "_fingerprint", None)
    how = "live" if fingerprint and type(rows).__module__.partition(".")[0] == "datasets" else ""
    return Opened(role, read(), lambda: fingerprint or digest.hexdigest(), how, meter=meter)


def display(path: Path) -> str:
    """A path as messages show it: relative where it lies below the working directory."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _row(where: str, values: Any) -> Row:
    if isinstance(values, Mapping):
        return Row(where, values)
    return Row(where, {}, BadRow("not-an-object", f"{describe(values)}, not an object with columns"))


def _ending(path: Path) -> str:
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _known_endings() -> str:
    return ", ".join(_READERS) + " (those but .parquet also with .gz)"


def _is_gzip(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


@contextmanager
def _open(path: Path, meter: Meter) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        meter.follow(file, path.stat().st_size)
        if not _is_gzip(path):
            yield file
            return
        with gzip.open(file) as unpacked:
            yield cast("IO[bytes]", unpacked)


def _guarded(name: str, rows: Iterator[Row]) -> Iterator[Row]:
    try:
        yield from rows
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> DataError:
    return DataError(f"{name}: cannot be read", why=str(error))


def _missing(path: Path) -> DataError:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if close:
        fix = "there is " + ", ".join(display(path.parent / name) for name in close)
    elif not path.parent.is_dir():
        fix = f"the folder {display(path.parent)} does not exist either; relative paths start at the recipe's folder"
    else:
        fix = "relative paths in a recipe start at the recipe's folder"
    return DataError(f"{display(path)}: no such file", fix=fix)


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(display(path), error) from error


def _file_stamp(path: Path) -> object:
    try:
        found = path.stat()
    except OSError:  # removed, or its folder
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def _folder_digest(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{_file_digest(file)}\n".encode())
    return digest.hexdigest()


# --- JSON


def _json(path: Path, meter: Meter) -> Iterator[Row]:
    """An array of objects, or an object per line: the first character decides, not the ending."""
    name = display(path)
    with _open(path, meter) as file:
        start = file.read(4096)
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{name}: the file is UTF-16, not UTF-8", fix="save it as UTF-8")
        file.seek(0)
        first = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        yield from _json_array(name, file) if first == b"[" else _json_lines(name, file)


def _json_array(name: str, file: IO[bytes]) -> Iterator[Row]:
    for number, values in enumerate(JsonArray(name, file), start=1):
        yield _row(f"{name} row {number}", values)


def _json_lines(name: str, file: IO[bytes]) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if content.strip():
            yield _json_line(f"{name}:{number}", content)


def _json_line(where: str, content: bytes) -> Row:
    try:
        return _row(where, json.loads(content.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Row(where, {}, BadRow("invalid-utf8", f"not UTF-8 text at byte {error.start + 1} of the line"))
    except json.JSONDecodeError as error:
        whole = " (a row must stand on one line)" if content.strip() in (b"{", b"}") else ""
        return Row(where, {}, BadRow("invalid-json", f"broken JSON: {error.msg} at column {error.colno}{whole}"))
    except (ValueError, RecursionError) as error:
        return Row(where, {}, BadRow("invalid-json", f"JSON that cannot be read: {error}"))


# --- CSV


def _csv(path: Path, meter: Meter) -> Iterator[Row]:
    name = display(path)
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the process-wide limit of 128 KB is short for a completion
    with _open(path, meter) as file:
        reader = csv.reader(_csv_lines(name, file), strict=True)
        try:
            header = next(reader, [])
            twice = sorted({column for column in header if header.count(column) > 1})
            if twice:
                raise DataError(f"{name}:1: the header names a column twice: {', '.join(twice)}")
            start = reader.line_num + 1
            for fields in reader:
                if fields:
                    yield _csv_row(f"{name}:{start}", header, fields)
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{name}:{reader.line_num}: broken CSV: {error}",
                fix='fields are separated by commas; quotes inside a quoted field are doubled ("")',
            ) from error


def _csv_lines(name: str, file: IO[bytes]) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{name}:{number}: not UTF-8 text", fix="save the file as UTF-8") from error


def _csv_row(where: str, header: list[str], fields: list[str]) -> Row:
    if len(fields) != len(header):
        return Row(where, {}, BadRow("field-count", f"{len(fields)} fields, the header has {len(header)}"))
    return Row(where, dict(zip(header, fields, strict=True)))


# --- parquet, saved folders, the hub


def _parquet(path: Path, meter: Meter) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = display(path)
    try:
        file = pq.ParquetFile(path)
        values = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
        for number, row in enumerate(meter.count(values, file.metadata.num_rows), start=1):
            yield _row(f"{name} row {number}", row)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{name}: cannot be read as parquet", why=_first_line(error)) from error


Reader = Callable[[Path, Meter], Iterator[Row]]
_READERS: dict[str, Reader] = {
    ".jsonl": _json,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _saved(path: Path, split: str | None) -> Opened:
    name = display(path)
    if not any((path / marker).exists() for marker in ("dataset_info.json", "dataset_dict.json")):
        files = sorted(p.name for p in path.iterdir() if _ending(p) in _READERS)
        raise DataError(
            f"{name}: a folder that was not saved by datasets (save_to_disk)",
            fix=f"name a file in it: {', '.join(files[:5])}" if files else f"name a file ({_known_endings()})",
        )
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # arrow's, json's and datasets' own errors have no common base
        raise DataError(f"{name}: cannot be read as a saved data set", why=_first_line(error)) from error
    table = _pick_split(loaded, split, name)
    return _table(table, name, "saved", cache(lambda: _folder_digest(path)))


def _hub(path: str, split: str | None) -> Opened:
    import datasets

    try:
        loaded = datasets.load_dataset(path, split=split)
    except Exception as error:  # not found, no network, gated, broken cards: many unrelated classes
        raise DataError(
            f'data set "{path}": no local file of that name, and it cannot be loaded from the hub',
            why=f"the hub cannot be reached, or it has no such data set or split: {_first_line(error)}",
            fix="give a local path (relative paths start at the recipe's folder), correct the id, or point HF_HOME at "
            "a cache that holds the data set",
        ) from error
    table = _pick_split(loaded, split, path, loaded_split=True)
    fingerprint = str(getattr(table, "_fingerprint", ""))
    return _table(table, path, "hub" if fingerprint else "", lambda: fingerprint)


def _pick_split(loaded: Any, split: str | None, name: str, loaded_split: bool = False) -> Any:
    """One split of what `datasets` loaded."""
    if not isinstance(loaded, Mapping):
        own = getattr(loaded, "split", None)
        if split is None or loaded_split or str(own) == split:
            return loaded
        raise DataError(f'{name}: no split "{split}"', why="it was saved as a single data set", fix="leave split out")
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split in loaded:
        return loaded[split]
    wanted = f'there is no split "{split}"' if split else "which split?"
    raise DataError(
        f"{name}: {wanted}", why=f"it holds {', '.join(map(str, loaded))}",
        fix=f'data.train = [{{path = "{name}", split = "{next(iter(loaded), "train")}"}}]',
    )  # fmt: skip


def _table(table: Any, name: str, how: str, digest: Callable[[], str]) -> Opened:
    meter = Meter()
    values = meter.count(table, len(table) if isinstance(table, Sized) else 0)
    rows = (_row(f"{name} row {number}", row) for number, row in enumerate(values, start=1))
    return Opened(name, rows, digest, how, meter=meter)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"[:300]
