"""The reference's log-probs on disk: one SQLite file for each reference and way of computing.

A row is one completion after one prompt: its key is a hash of their token ids, its value the log-prob of each token as
float32, with its length and a checksum that are compared on reading. Whatever is wrong with a file (damaged, locked,
read-only, full) is said, and the run goes on: what cannot be read is computed, and kept in memory alone if it must be.

SQLite's write-ahead log lets several runs of one machine read and write one file at a time. Of one run only the first
rank opens it, so that ranks on other machines never meet in a file of a shared file system, where that log is not safe.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sqlite3
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from alignzoo.data.cache import base_folder, size_limit
from alignzoo.progress import Say
from alignzoo.tree import Ids, LogPs

FORMAT = 1  # of the files
WAIT = 30.0  # seconds for another writer
_AT_ONCE = 500  # keys in one question
_KEY = 16  # bytes
_DAMAGE = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_IOERR_SHORT_READ")
_TABLES = """
CREATE TABLE IF NOT EXISTS info (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS rows (
    key BLOB PRIMARY KEY, length INTEGER NOT NULL, checksum INTEGER NOT NULL, logps BLOB NOT NULL
);
"""
T = TypeVar("T")


def row_key(prompt: Ids, completion: Ids) -> bytes:
    """The key of a completion after a prompt."""
    digest = hashlib.blake2b(struct.pack("<q", len(prompt)), digest_size=_KEY)
    digest.update(np.ascontiguousarray(prompt, "<i4").tobytes())
    digest.update(np.ascontiguousarray(completion, "<i4").tobytes())
    return digest.digest()


def prompt_key(prompt: Ids) -> bytes:
    """The key of a prompt: as long for a long one as for a short one."""
    return row_key(prompt, prompt[:0])


def reference_folder() -> Path:
    """Where log-probs of references are kept. Raises RuntimeError where "~" stands for no folder."""
    return base_folder() / "reference"


@dataclass(frozen=True)
class Identity:
    """Whose log-probs they are, and how they were computed."""

    fingerprint: str  # of the content of the weights
    numerics: Mapping[str, Any]
    words: str  # for people; no part of the name

    @property
    def name(self) -> str:
        parts = {"format": FORMAT, "reference": self.fingerprint, "numerics": dict(self.numerics)}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


class ReferenceStore:
    """The rows of one reference. `off` says why nothing is kept, "" where it is."""

    def __init__(self, identity: Identity | None, say: Say, off: str = "") -> None:
        self._identity, self._say = identity, say
        self.off, self.bad, self.folder = off, 0, Path()
        self._db: sqlite3.Connection | None = None
        self._lock: IO[bytes] | None = None
        self._limit = size_limit()
        if identity is None or off or not self._limit:
            self.off = off or "ALIGNZOO_CACHE_GB = 0"
            return
        try:
            self.folder = reference_folder()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / f"{identity.name}.lock").open("ab")
        except (OSError, RuntimeError) as error:
            self.off = f"the cache {self.folder} cannot be written to ({error})"
            return
        self._in_use()
        self._open()

    @property
    def path(self) -> Path:
        assert self._identity is not None
        return self.folder / f"{self._identity.name}.sqlite"

    # --- rows

    def find(self, wanted: Mapping[bytes, int]) -> dict[bytes, LogPs]:
        """The log-probs of those keys that are there and whole. wanted: the length of each. Bad rows are counted."""
        found: dict[bytes, LogPs] = {}
        keys = list(wanted)
        for start in range(0, len(keys), _AT_ONCE):
            part = keys[start : start + _AT_ONCE]
            rows: list[Any] = self._do(partial(_rows_of, keys=part), [])
            for row in rows:
                logps = checked(*row, expected=wanted[row[0]])
                if logps is None:
                    self.bad += 1
                else:
                    found[row[0]] = logps
        return found

    def keep(self, rows: Mapping[bytes, LogPs]) -> None:
        """Writes rows, in one transaction. What is not finite is not kept."""
        if self._db is not None and _size(self.path) > self._limit:
            self._give_up(f"it has {_size(self.path) / 1e9:.3g} GB, and ALIGNZOO_CACHE_GB allows no more")
        made = [_packed(key, logps) for key, logps in rows.items() if np.isfinite(logps).all()]
        self._do(lambda db: db.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?)", made), None)

    def alone(self) -> contextlib.AbstractContextManager[bool]:
        """Whether no other run fills the same file; others see this one for as long as it is open."""
        return _held(self.path.with_suffix(".filling")) if self._db is not None else contextlib.nullcontext(True)

    def close(self) -> None:
        """Lets go of the file, and removes what was not used for the longest time where the cache is too large."""
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None
            prune(self._limit, self._say, keep=self.path)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # --- the file

    def _open(self) -> None:
        try:
            self._db = sqlite3.connect(self.path, timeout=WAIT)
        except sqlite3.Error as error:
            self._give_up(str(error))
            return
        self._do(self._prepare, None)
        with contextlib.suppress(OSError):
            os.utime(self.path)  # when it was last used

    def _in_use(self) -> None:
        """From now on nobody removes the file, where files can be locked."""
        with contextlib.suppress(OSError):
            assert self._lock is not None
            fcntl.flock(self._lock, fcntl.LOCK_SH)

    def _prepare(self, db: sqlite3.Connection) -> None:
        assert self._identity is not None
        db.text_factory = bytes  # a damaged row may hold what is no text
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        if db.execute("SELECT count(*) FROM sqlite_master WHERE name IN ('info', 'rows')").fetchone()[0] == 2:
            return
        db.executescript(_TABLES)
        about = {"words": self._identity.words, "fingerprint": self._identity.fingerprint}
        rows = [*about.items(), ("numerics", json.dumps(dict(self._identity.numerics), sort_keys=True))]
        db.executemany("INSERT OR REPLACE INTO info VALUES (?, ?)", rows)

    def _do(self, what: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """Something with the file; where it is damaged, once more with a new one."""
        for last in (False, True):
            if self._db is None:
                return otherwise
            try:
                with self._db:
                    return what(self._db)
            except sqlite3.Error as error:
                name = getattr(error, "sqlite_errorname", "")
                if last or not name.startswith(_DAMAGE):
                    self._give_up(f"{error} ({name})")
                else:
                    self._begin_anew(error)
        return otherwise

    def _give_up(self, why: str) -> None:
        self.off = f"{self.path}: {why}"
        self._say(f"reference log-probs are not kept: {self.off}")
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
        self._db = None

    def _begin_anew(self, error: sqlite3.Error) -> None:
        """Removes the file, unless another run, which may have done so already, is at it."""
        assert self._db is not None and self._lock is not None
        self._say(f"the reference log-probs in {self.path} are damaged ({error}): they are computed again")
        self._db.close()
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(self.path)
        except OSError:
            pass
        self._in_use()
        try:
            self._db = sqlite3.connect(self.path, timeout=WAIT)
            with self._db:
                self._prepare(self._db)
        except sqlite3.Error as again:
            self._give_up(str(again))


def _rows_of(db: sqlite3.Connection, keys: Sequence[bytes]) -> list[Any]:
    marks = ", ".join("?" * len(keys))
    return db.execute(f"SELECT key, length, checksum, logps FROM rows WHERE key IN ({marks})", list(keys)).fetchall()


def _packed(key: bytes, logps: LogPs) -> tuple[bytes, int, int, bytes]:
    content = np.ascontiguousarray(logps, "<f4").tobytes()
    return key, len(logps), zlib.crc32(key + content), content


def checked(key: Any, length: Any, checksum: Any, content: Any, *, expected: int | None = None) -> LogPs | None:
    """The log-probs of a row, None where it is not what was written."""
    if not isinstance(content, bytes) or not isinstance(key, bytes) or len(content) != 4 * length:
        return None
    if zlib.crc32(key + content) != checksum or expected not in (None, length):
        return None
    return np.frombuffer(content, "<f4").astype(np.float32)


# --- all references


@dataclass(frozen=True)
class Kept:
    """What is kept of one reference."""

    path: Path
    words: str
    numerics: dict[str, Any]
    rows: int
    size: int  # bytes
    used: float  # seconds since 1970
    damage: str = ""


def kept_references() -> list[Kept]:
    """All of them, the last used first."""
    return sorted((_kept(path) for path in reference_folder().glob("*.sqlite")), key=lambda kept: -kept.used)


def _kept(path: Path) -> Kept:
    size, used = _size(path), path.stat().st_mtime
    try:
        with _reading(path) as db:
            info = dict(db.execute("SELECT name, value FROM info").fetchall())
            rows = db.execute("SELECT count(*) FROM rows").fetchone()[0]
            return Kept(path, info["words"], json.loads(info["numerics"]), rows, size, used)
    except (sqlite3.Error, KeyError, ValueError) as error:
        return Kept(path, "", {}, 0, size, used, damage=str(error) or type(error).__name__)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path, timeout=WAIT)) as db, db:
        yield db


def verify_reference(path: Path) -> tuple[int, int]:
    """Reads every row: how many are whole, and how many were not and are removed. Raises sqlite3.Error for a file that
    cannot be read through."""
    good, bad = 0, []
    with _reading(path) as db:
        db.text_factory = bytes  # a damaged row may hold what is no text
        problem = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != b"ok":
            raise sqlite3.DatabaseError(problem.decode(errors="replace"))
        for number, *row in db.execute("SELECT rowid, key, length, checksum, logps FROM rows"):
            if checked(*row) is None:
                bad.append((number,))
            else:
                good += 1
        db.executemany("DELETE FROM rows WHERE rowid = ?", bad)
    return good, len(bad)


def remove_reference(path: Path) -> bool:
    """Removes a file that no run has open; False where one has."""
    with _held(path.with_suffix(".lock")) as free:
        if free:
            _remove(path)
            for kind in (".lock", ".filling"):
                path.with_suffix(kind).unlink(missing_ok=True)
        return free


def prune(limit: float, say: Say, keep: Path | None = None) -> None:
    """Removes references that were not used for the longest time, until what stays is within so many bytes."""
    with contextlib.suppress(OSError):
        files = sorted((path.stat().st_mtime, path) for path in reference_folder().glob("*.sqlite"))
        excess = sum(_size(path) for _, path in files) - limit
        for used, path in files:
            size = _size(path)
            if excess > 0 and path != keep and remove_reference(path):
                day = time.strftime("%Y-%m-%d", time.localtime(used))
                say(f"removed reference log-probs last used on {day}: {path} ({size / 1e9:.3g} GB)")
                excess -= size


def _files(path: Path) -> list[Path]:
    return [path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))]


def _size(path: Path) -> int:
    found = 0
    for file in _files(path):
        with contextlib.suppress(OSError):
            found += file.stat().st_size
    return found


def _remove(path: Path) -> None:
    for file in reversed(_files(path)):
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Holds a lock file; False where another process has it. Where files cannot be locked nobody has."""
    with contextlib.ExitStack() as stack:
        free = True
        try:
            file = stack.enter_context(path.open("ab"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            pass
        yield free
