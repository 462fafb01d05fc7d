"""The cache of prepared data on disk: one store for each source, found by the hash of all that it was made from.

A store is written aside and renamed when it is complete, so an entry is there as a whole or not at all, and of two
processes that make the same one, one keeps its own. `ALIGNZOO_CACHE` names another folder than ~/.cache/alignzoo, and
`ALIGNZOO_CACHE_GB` how large the cache may grow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import date
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignzoo.data.store import Damaged, Store, StoreWriter
from alignzoo.data.writing import Template
from alignzoo.errors import DataError
from alignzoo.progress import Say
from alignzoo.recipe import Data, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1  # of the files; the code that makes their content is hashed
_DEFAULT_GB = 20.0
_ASIDE = ".new-"  # what a name begins with until the store is complete
_LEFT_BEHIND = 24 * 3600  # seconds without a change after which nobody writes to such a folder any more
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow", "numpy")
_CHOICES = ("train", "eval", "eval_fraction")  # of [data]: made among rows that are prepared


def cache_folder() -> Path:
    """Where prepared data is kept."""
    named = os.environ.get("ALIGNZOO_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "alignzoo"
    return Path(named or base).expanduser().absolute() / "data"


def _limit() -> float:
    """Bytes that the cache may have."""
    text = os.environ.get("ALIGNZOO_CACHE_GB", "")
    try:
        gigabytes = float(text) if text else _DEFAULT_GB
    except ValueError:
        gigabytes = -1.0
    if not gigabytes >= 0:
        raise DataError(f"ALIGNZOO_CACHE_GB = {text!r} is no size", fix="give a number of gigabytes, 0 or more")
    return gigabytes * 1e9


class DataCache:
    """Finds and makes stores. `say` gets a line where something is not as it should be, or was removed."""

    def __init__(self, say: Say) -> None:
        self.folder, self._say, self._limit = cache_folder(), say, _limit()
        self._in_use: set[Path] = set()  # entries of this run are not removed
        self._writable = True  # as far as is known

    def find(self, key: str, name: str) -> Store | None:
        """The store of a key, every byte of it checked. A damaged one is said and removed."""
        entry = self.folder / key
        try:
            entry.stat()
        except OSError:
            return None
        try:
            store = Store(entry, name, key=key)
        except (Damaged, OSError) as error:
            self._say(f"the prepared data in {entry} cannot be used, so it is made anew: {error}")
            shutil.rmtree(entry, ignore_errors=True)
            return None
        with contextlib.suppress(OSError):  # another's cache, or a read-only one
            os.utime(entry)  # when it was last used
        self._in_use.add(entry)
        return store

    def make(self, key: str | None, name: str, fill: Callable[[StoreWriter], Mapping[str, Any]]) -> Store:
        """A new store, kept under its key; without one, for as long as it is in use.

        fill: writes the rows and returns the facts. What it raises comes out, and nothing is left behind.
        """
        folder = (self._aside() if key else None) or _temporary()
        try:
            writer = StoreWriter(folder)
            try:
                writer.finish(key or "", fill(writer))
            finally:
                writer.close()
            store = Store(folder, name)
            if key and folder.parent == self.folder:
                self._keep(folder, key)
            return store
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # an open store stays readable

    def _aside(self) -> Path | None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=_ASIDE, dir=self.folder))
        except OSError as error:
            if self._writable:
                self._say(f"prepared data is not kept: the cache {self.folder} cannot be written to ({error.strerror})")
            self._writable = False
            return None

    def _keep(self, folder: Path, key: str) -> None:
        entry = self.folder / key
        with contextlib.suppress(OSError):  # another process was faster; its store is the same
            folder.rename(entry)
        self._in_use.add(entry)
        self._prune()

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
        removed = 0
        for _, path, size in sorted(kept):
            if excess - removed > 0 and path not in self._in_use:
                shutil.rmtree(path, ignore_errors=True)
                self._say(f"removed prepared data that was not used for the longest time: {path} ({size / 1e9:.3g} GB)")
                removed += size


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

    Weights, held-out rows and seeds are no part of it: they choose among rows that are prepared.
    """
    words = _tokenizer_digest(tokenizer)
    if words is None:
        return None
    return _hash(
        {
            "format": FORMAT,
            "code": _code_digest(),
            "libraries": _versions(),
            "data": {k: v for k, v in dataclasses.asdict(data).items() if k not in _CHOICES},
            "kind": kind,
            "tokenizer": words,
            "template": dataclasses.asdict(dataclasses.replace(template, ends=tuple(sorted(template.ends)))),
            "own_template": tokenizer.chat_template if template.text is None else "",
            "day": date.today().isoformat() if template.does.dated else "",
        }
    )


def store_key(settings: str, source: Source, reader: str, digest: str) -> str:
    """The key of a source's store. settings: a settings_key. reader, digest: what reads the content, and its hash."""
    own = {k: v for k, v in dataclasses.asdict(source).items() if k not in ("path", "weight")}
    return _hash({"settings": settings, "source": own, "content": [reader, digest]})


def _hash(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:40]


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Vocabulary, normalisation, splitting and special tokens; None where they are not of the library `tokenizers`."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
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
