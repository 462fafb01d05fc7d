"""sha256 of large files, remembered: a file that is as it was is not read again.

What is remembered stands in `hashes.sqlite` of the cache's folder. A file is known again by path, size, inode and both
of its times, so one that was copied over with its old date is hashed anew.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from alignzoo.data.cache import base_folder, size_limit
from alignzoo.rundir import hash_file

FILE = "hashes.sqlite"
SMALL = 1 << 20  # bytes; a smaller file is read faster than it is looked up
_YOUNG = 2.0  # seconds; a file may change so soon again that its times do not tell
_TABLE = "CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, state TEXT NOT NULL, sha256 TEXT NOT NULL)"


def remembered_hash(path: Path) -> str:
    """sha256 of a file's content. Raises AlignzooError where it cannot be read."""
    try:
        found = path.resolve().stat()
    except OSError:
        return hash_file(path)
    if found.st_size < SMALL or not size_limit():
        return hash_file(path)
    name, state = str(path.resolve()), f"{found.st_size} {found.st_ino} {found.st_mtime_ns} {found.st_ctime_ns}"
    with contextlib.suppress(sqlite3.Error, OSError, RuntimeError), _memory() as memory:
        row = memory.execute("SELECT sha256 FROM files WHERE path = ? AND state = ?", (name, state)).fetchone()
        if row is not None:
            return str(row[0])
    digest = hash_file(path)
    if time.time() - max(found.st_mtime, found.st_ctime) > _YOUNG:
        with contextlib.suppress(sqlite3.Error, OSError, RuntimeError), _memory() as memory:
            memory.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", (name, state, digest))
    return digest


@contextlib.contextmanager
def _memory() -> Iterator[sqlite3.Connection]:
    folder = base_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(folder / FILE, timeout=5)) as memory, memory:
        memory.execute(_TABLE)
        yield memory
