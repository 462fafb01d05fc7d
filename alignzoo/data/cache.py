"""The cache of prepared data on disk: one store for each source, found by the hash of all that it was made from.

A store is written aside and renamed when it is complete, so an entry is there as a whole or not at all. Of several
processes that want the same one, the ranks of a run among them, one makes it and the others wait for it; where no file
can be locked, each makes it, and one keeps its own. `ALIGNZOO_CACHE` names another folder than ~/.cache/alignzoo, and
`ALIGNZOO_CACHE_GB` how large the cache may grow (0: nothing is kept).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignzoo.data.store import Damaged, Store, StoreWriter, rows_of
from alignzoo.data.writing import Template
from alignzoo.errors import DataError
from alignzoo.progress import Say
from alignzoo.recipe import Data, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1  # of the files; the code that makes their content is hashed
_DEFAULT_GB = 20.0
_ASIDE = ".new-"  # what the name of a folder begins with until it is a complete store, and while it is removed
_LOCK = ".lock"  # of each key one byte is locked while its store is made
_LEFT_BEHIND = 24 * 3600  # seconds without a change after which nobody writes to such a folder any more
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow", "numpy")
_CHOICES = ("train", "eval", "eval_fraction", "format")  # of [data]: among prepared rows, or each source has it
_IN_WORDS = {"name": "", "source": ""}  # of a template: for messages, no row depends on them


def base_folder() -> Path:
    """The folder of all that alignzoo keeps between runs. Raises RuntimeError where "~" stands for no folder."""
    named = os.environ.get("ALIGNZOO_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "alignzoo"
    return Path(named or base).expanduser().absolute()


def cache_folder() -> Path:
    """Where prepared data is kept. Raises RuntimeError where "~" stands for no folder."""
    return base_folder() / "data"


def size_limit() -> float:
    """Bytes that each folder of the cache may have."""
    text = os.environ.get("ALIGNZOO_CACHE_GB", "")
    try:
        gigabytes = float(text) if text else _DEFAULT_GB
    except ValueError:
        gigabytes = -1.0
    if not gigabytes >= 0:
        raise DataError(f"ALIGNZOO_CACHE_GB = {text!r} is no size", fix="give a number of gigabytes, 0 or more")
    return gigabytes * 1e9


class DataCache:
    """Finds and makes stores. `say` gets a line where something is not as it should be, was waited for or removed."""

    def __init__(self, say: Say) -> None:
        self._say, self._limit = say, size_limit()
        self._in_use: set[Path] = set()  # entries of this run are not removed
        self._off = "" if self._limit else "ALIGNZOO_CACHE_GB = 0"  # why nothing is kept, as far as is known
        self._said = False
        try:
            self.folder = cache_folder()
        except RuntimeError as error:
            self.folder, self._off = Path(), str(error)
        self._readable = not self._off

    def find(self, key: str, name: str) -> Store | None:
        """The store of a key, every byte of it checked. A damaged one is said and removed."""
        if not self._readable:
            return None
        entry = self.folder / key
        try:
            entry.stat()
        except OSError:
            return None
        try:
            store = Store(entry, name, key=key)
        except (Damaged, OSError) as error:
            self._say(f"the prepared data in {entry} cannot be used, so it is made anew: {error}")
            self._remove(entry)
            return None
        with contextlib.suppress(OSError):  # another's cache, or a read-only one
            os.utime(entry)  # when it was last used
        self._in_use.add(entry)
        return store

    def make(self, key: str | None, name: str, fill: Callable[[StoreWriter], Mapping[str, Any]]) -> Store:
        """A new store, kept under its key; without one, for as long as it is in use.

        fill: writes the rows and returns the facts. What it raises comes out, and nothing is left behind. It is not
        called where the store is there in the meantime: made by another process, or for a source of the same content.
        """
        aside = self._aside() if key else None
        if key is None or aside is None:
            with _removed(_temporary()) as folder:
                return _filled(folder, "", name, fill)
        with _removed(aside), self._alone(key, name):
            store = self.find(key, name)
            if store is None:
                store = _filled(aside, key, name, fill)
                self._keep(aside, key)
            else:
                self._say(f"prepared data: {len(store)} rows of {name} from the cache {self.folder}")
            return store

    def _aside(self) -> Path | None:
        """A new folder, with the rights that the user gives to folders; None where nothing can be kept."""
        folder = self.folder / f"{_ASIDE}{secrets.token_hex(8)}"
        try:
            if not self._off:
                folder.mkdir(parents=True)
                return folder
        except OSError as error:
            self._off = f"the cache {self.folder} cannot be written to ({error.strerror})"
        if not self._said:
            self._say(f"prepared data is not kept: {self._off}")
        self._said = True
        return None

    @contextlib.contextmanager
    def _alone(self, key: str, name: str) -> Iterator[None]:
        """Waits while another process makes the same store. What is forked in the meantime does not hold the lock."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # another user's file, or a file system without locks
                file = stack.enter_context((self.folder / _LOCK).open("ab"))
                place = int(key[:12], 16)
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
                except (BlockingIOError, PermissionError):
                    self._say(f"another process prepares {name}: waiting for it")
                    fcntl.lockf(file, fcntl.LOCK_EX, 1, place)
            yield

    def _keep(self, folder: Path, key: str) -> None:
        entry = self.folder / key
        with contextlib.suppress(OSError):  # another process was faster; its store is the same
            folder.rename(entry)
        self._in_use.add(entry)
        self._prune()

    def _remove(self, entry: Path) -> None:
        """Under another name first: no process finds a part of it."""
        aside = self.folder / f"{_ASIDE}{secrets.token_hex(8)}"
        with contextlib.suppress(OSError), _removed(aside):  # another's cache, or removed by another process
            entry.rename(aside)

    def _prune(self) -> None:
        """Removes what was left behind, and the entries that were not used for the longest time beyond the limit."""
        kept = []
        for path in list(self.folder.iterdir()):
            with contextlib.suppress(OSError):  # removed by another process
                if path.name.startswith(_ASIDE):
                    if time.time() - max(p.stat().st_mtime for p in (path, *path.iterdir())) > _LEFT_BEHIND:
                        shutil.rmtree(path, ignore_errors=True)
                elif path.is_dir():
                    kept.append((path.stat().st_mtime, path, sum(p.stat().st_size for p in path.iterdir())))
        excess = sum(size for _, _, size in kept) - self._limit
        for _, path, size in sorted(kept):
            if excess > 0 and path not in self._in_use:
                self._remove(path)
                self._say(f"removed prepared data that was not used for the longest time: {path} ({size / 1e9:.3g} GB)")
                excess -= size


@dataclasses.dataclass(frozen=True)
class Entry:
    """A store in the cache."""

    path: Path
    rows: int
    size: int  # bytes
    used: float  # seconds since 1970


def kept_data() -> list[Entry]:
    """All stores in the cache, the last used first."""
    found = []
    for path in (p for p in cache_folder().glob("*") if p.is_dir() and not p.name.startswith(_ASIDE)):
        with contextlib.suppress(OSError):  # removed by another process
            size = sum(p.stat().st_size for p in path.iterdir())
            found.append(Entry(path, rows_of(path), size, path.stat().st_mtime))
    return sorted(found, key=lambda entry: -entry.used)


def damage_of(path: Path) -> str:
    """What is wrong with a store in the cache, "" where every byte of it is as it was written."""
    try:
        Store(path, path.name, key=path.name)
    except (Damaged, OSError) as error:
        return str(error)
    return ""


def remove_data(path: Path) -> None:
    """Removes a store. Who has it open keeps its rows."""
    aside = path.with_name(f"{_ASIDE}{secrets.token_hex(8)}")
    with contextlib.suppress(OSError), _removed(aside):
        path.rename(aside)


def prune_data(limit: float, say: Say) -> None:
    """Removes stores that were not used for the longest time, until what stays is within so many bytes."""
    cache = DataCache(say)
    cache._limit = limit
    if cache.folder.is_dir():
        cache._prune()


def _filled(folder: Path, key: str, name: str, fill: Callable[[StoreWriter], Mapping[str, Any]]) -> Store:
    writer = StoreWriter(folder)
    try:
        writer.finish(key, fill(writer))
    finally:
        writer.close()
    return Store(folder, name)


@contextlib.contextmanager
def _removed(folder: Path) -> Iterator[Path]:
    """A folder that is gone afterwards, unless it has got another name. An open store stays readable."""
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _temporary() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="alignzoo-"))
    except OSError as error:
        raise DataError(
            "there is no folder to prepare data in",
            why=str(error),
            fix="let TMPDIR name a folder that can be written to",
        ) from error


# --- what a store is made from


def settings_key(data: Data, kind: str, tokenizer: PreTrainedTokenizerBase, template: Template) -> str | None:
    """The hash of all that the rows of any source depend on; None for a tokenizer that cannot be told from others.

    Weights, held-out rows and seeds are no part of it: they choose among rows that are prepared. Nor are paths.
    """
    words = _tokenizer_digest(tokenizer)
    if words is None:
        return None
    return _hash(
        {
            "format": FORMAT,
            "code": _code_digest(),
            "libraries": _versions(),
            "data": {k: v for k, v in dataclasses.asdict(data).items() if k not in (*_CHOICES, "chat_template")},
            "kind": kind,
            "tokenizer": words,
            "template": {**dataclasses.asdict(template), **_IN_WORDS, "ends": sorted(template.ends)},
            "own_template": tokenizer.chat_template if template.text is None else "",
            "day": date.today().isoformat() if template.does.dated else "",
        }
    )


def store_key(settings: str, source: Source, reader: str, digest: str, made_by: Sequence[Sequence[str]] = ()) -> str:
    """The key of a source's store. settings: a settings_key. reader, digest: what reads the content, and its hash.

    made_by: distribution, version and source hash of a plugin's format; alignzoo's own are in settings
    """
    own = {k: v for k, v in dataclasses.asdict(source).items() if k not in ("path", "weight")}
    return _hash({"settings": settings, "source": own, "content": [reader, digest], "made_by": made_by})


def _hash(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:40]


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Vocabulary, normalisation, splitting and special tokens.

    None where they are not of the library `tokenizers`, or the class is not of transformers: it may do anything.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str") or not type(tokenizer).__module__.startswith("transformers."):
        return None
    more = {
        "class": type(tokenizer).__qualname__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", None),
    }
    text = json.dumps(more, sort_keys=True, default=repr) + backend.to_str()
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@cache
def _code_digest() -> str:
    """Of the modules and templates that make rows: a change of them needs no new number that somebody forgets."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted([*here.rglob("*.py"), *here.rglob("*.jinja")]):
        digest.update(f"{path.relative_to(here)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
