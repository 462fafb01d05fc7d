"""The run directory: one new folder for each run, and what it was made from. It imports no torch.

    recipe.toml     the resolved recipe; `alignzoo run` takes it again
    manifest.json   versions, plugins, hashes of data and weights, seed, git revision, command
    metrics.jsonl   one line for each record, as it goes
    plugins/        copies of the files that were given with --plugin

and while it goes checkpoints/, at its end what report.finish writes. Every file but metrics.jsonl is written whole or
not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w

from alignzoo.errors import AlignzooError, PluginError, RecipeError, RunError

METRICS = "metrics.jsonl"
WARNING = "warning"  # the key that tells a line that says what is wrong (symptoms.py) from a record
NON_FINITE = "non_finite"  # the key under which a record tells what its nulls were
DISTRIBUTIONS = (
    "torch", "transformers", "accelerate", "deepspeed", "peft", "trl", "datasets", "tokenizers", "safetensors",
    "huggingface-hub", "numpy", "pluggy", "gguf", "bitsandbytes", "flash-attn", "kernels", "liger-kernel", "vllm",
    "triton", "tensorboard", "wandb",
)  # fmt: skip
_GIT_SECONDS = 5.0


def run_name(recipe_name: str, loss_name: str, now: datetime) -> str:
    """The default name of a run: "dpo-20261121-101500", or "shop-dpo-..." where recipe and loss differ in name."""
    parts = [recipe_name] if recipe_name == loss_name else [recipe_name, loss_name]
    return re.sub(r"[^\w.+-]+", "-", "-".join([*parts, now.strftime("%Y%m%d-%H%M%S")]))


@dataclass(frozen=True)
class RunDir:
    """A folder that belongs to one run. `RunDir.create` makes a new one, `RunDir(path)` is one that exists."""

    path: Path

    @classmethod
    def create(cls, base: Path, name: str) -> RunDir:
        """A new folder base/name, or base/name-2, -3, ... where that is taken; two runs never share one.

        Raises AlignzooError where the name is no folder's name or `base` cannot be written to.
        """
        if not name.strip() or name in (".", "..") or re.search(r"[/\\\0]", name):
            raise AlignzooError(
                f'"{name}" cannot be the name of a run directory', fix="set log.run_name without slashes"
            )
        try:
            base.mkdir(parents=True, exist_ok=True)
            for n in itertools.count(1):
                path = base / (name if n == 1 else f"{name}-{n}")
                try:
                    path.mkdir()  # atomic: of two runs, one gets the folder and the other FileExistsError
                except FileExistsError:
                    continue
                break
        except OSError as error:
            raise _cannot_write(base, error, "set output.dir to a folder that you may write to") from error
        return cls(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Did the run come to its end: the model saved, and then the closing figures?"""
        return (self.path / "model").is_dir() and (self.path / "summary.json").is_file()

    def read_manifest(self) -> dict[str, Any]:
        """manifest.json. Raises AlignzooError where the folder is no run directory."""
        try:
            found = json.loads((self.path / "manifest.json").read_bytes())
        except (OSError, ValueError) as error:
            raise AlignzooError(
                f"{self.path}: no run directory", why=str(error), fix="name a folder that `alignzoo run` made"
            ) from error
        return dict(found)

    @contextmanager
    def held(self) -> Iterator[None]:
        """While a run writes here. Raises AlignzooError where another process does; a killed one no longer holds it.

        Where the file system knows no locks, as on some network disks, nothing is held and nothing is raised.
        """
        handle = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise AlignzooError(
                    f"{self.path}: a run is writing there",
                    why="another process on this directory has not ended",
                    fix="wait for it, or end it first",
                ) from error
            except OSError:
                pass
            yield
        finally:
            os.close(handle)

    def write_text(self, name: str, text: str) -> Path:
        """A file of the run, UTF-8, line ends as they are."""
        return atomic_write(self.path / name, text.encode("utf-8"))

    def write_json(self, name: str, data: Any) -> Path:
        """Strict JSON: raises RunError where `data` holds NaN or an infinity (see `nulled`)."""
        return self.write_text(name, strict_json(data, name, indent=2) + "\n")

    def write_recipe(self, table: Mapping[str, Any]) -> Path:
        """recipe.toml, from recipe.to_table: it reads back as the same recipe."""
        try:
            text = tomli_w.dumps(table)
        except TypeError as error:
            raise RecipeError(
                "the recipe cannot be written as TOML",
                why=str(error),
                fix="use numbers, strings, lists and tables; TOML has no null",
            ) from error
        return self.write_text("recipe.toml", text)

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """One more line of metrics.jsonl, handed to the operating system when this returns.

        NaN and infinities are written as null, and the record's "non_finite" names them: "grad_norm=inf".
        """
        finite, lost = nulled(dict(record))
        if lost:
            finite[NON_FINITE] = ", ".join(f"{key}={record[key]}" for key in lost)
        line = strict_json(finite, METRICS).encode("utf-8") + b"\n"
        path = self.path / METRICS
        try:
            if _is_cut(path):
                line = b"\n" + line  # what an interruption left of a line must not swallow this one
            with path.open("ab") as file:
                file.write(line)
        except OSError as error:
            raise _cannot_write(path, error) from error

    def sync_metrics(self) -> int:
        """Bytes of metrics.jsonl, all of them on the disk: what a checkpoint notes for `trim_metrics`."""
        path = self.path / METRICS
        try:
            with path.open("ab") as file:
                os.fsync(file.fileno())
                return file.tell()
        except OSError as error:
            raise _cannot_write(path, error) from error

    def trim_metrics(self, size: int) -> int:
        """metrics.jsonl as it was with `size` bytes: a run that goes on writes the later lines again.

        Returns the number of lines that were cut, half ones too. Raises AlignzooError where lines are missing.
        """
        path = self.path / METRICS
        content = path.read_bytes() if path.exists() else b""
        if len(content) < size or content[:size][-1:] not in (b"", b"\n"):
            raise AlignzooError(
                f"{path}: not the file that the checkpoint was made with",
                why=f"it has {len(content)} bytes; at the checkpoint it had {size}, to the end of a line",
                fix="put the file back as the run left it, or start a new run",
            )
        if len(content) > size:
            atomic_write(path, content[:size])
        return len(content[size:].splitlines())

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl in order; [] where there is none yet. Warnings are no records.

        A line that an interruption cut is left out with a warning that names it.
        """
        return [line for line in self._lines() if WARNING not in line]

    def read_warnings(self) -> list[dict[str, Any]]:
        """The warnings among the lines of metrics.jsonl, in order (symptoms.Finding.record)."""
        return [line for line in self._lines() if WARNING in line]

    def _lines(self) -> list[dict[str, Any]]:
        path = self.path / METRICS
        try:
            lines = path.read_bytes().split(b"\n") if path.exists() else []
        except OSError as error:
            raise AlignzooError(f"{path}: cannot be read", why=str(error)) from error
        records = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            record = _record(line)
            if record is None:
                warnings.warn(f"{path}:{number}: cut by an interruption, this record is left out", stacklevel=3)
            else:
                records.append(record)
        return records

    def copy_plugin(self, path: Path) -> Path:
        """A copy of a --plugin file under plugins/; another file of the same name is kept beside it as name-2.py."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise PluginError(f"{path}: cannot be read", why=str(error), fix="--plugin names a .py file") from error
        for n in itertools.count(1):
            copy = self.path / "plugins" / (path.name if n == 1 else f"{path.stem}-{n}{path.suffix}")
            if not copy.exists():
                return atomic_write(copy, content)
            if copy.read_bytes() == content:
                break
        return copy


def atomic_write(path: Path, content: bytes) -> Path:
    """The file with this content, or the file as it was: never a half. Returns `path`; raises AlignzooError."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return path


def nulled(data: Any, path: str = "") -> tuple[Any, list[str]]:
    """A copy of JSON-like data with None for NaN and infinities, and the dotted keys of those."""
    if isinstance(data, float):
        return (data, []) if math.isfinite(data) else (None, [path])
    if isinstance(data, Mapping):
        items = {key: nulled(value, f"{path}.{key}" if path else str(key)) for key, value in data.items()}
        return {key: value for key, (value, _) in items.items()}, [k for _, lost in items.values() for k in lost]
    if isinstance(data, list | tuple):
        values = [nulled(value, f"{path}.{i}" if path else str(i)) for i, value in enumerate(data)]
        return [value for value, _ in values], [k for _, lost in values for k in lost]
    return data, []


def strict_json(data: Any, name: str, indent: int | None = None) -> str:
    """JSON that every reader takes. `name` is the file's, for the error."""
    try:
        return json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        keys = ", ".join(nulled(data)[1])
        raise RunError(
            f"{name}: not a finite number: {keys or error}", why="JSON has no NaN and no infinity"
        ) from error


def manifest(
    *,
    command: Sequence[str],
    seed: int,
    started: datetime,
    plugins: Sequence[Mapping[str, Any]] = (),
    data: Mapping[str, str] | None = None,
    weights: Mapping[str, str] | None = None,
    recipe_folder: Path | None = None,
    live: Sequence[str] = (),
) -> dict[str, Any]:
    """What a run was made from, for manifest.json. It never fails, and it takes nothing from the environment.

    command:  the words of the command line; [] when the run was started from Python
    started:  becomes UTC; a time without a zone is local
    plugins:  one table for each distribution or file that gave a loss
    data, weights:  name -> sha256, see `hash_file` and `hash_folder`
    recipe_folder:  where the recipe lies, for its git revision
    live:     what was given from Python in the place of what the recipe names: "model", "tokenizer", "train", "eval"
    """
    from alignzoo import __version__

    return {
        "command": list(command),
        "started": started.astimezone(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "alignzoo": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "versions": versions(),
        "plugins": [dict(plugin) for plugin in plugins],
        "data": dict(data or {}),
        "weights": dict(weights or {}),
        "live": list(live),
        "git": {
            "working_directory": git_revision(Path()),
            "recipe": None if recipe_folder is None else git_revision(recipe_folder),
        },
    }


def versions(names: Sequence[str] = DISTRIBUTIONS) -> dict[str, str]:
    """The installed versions of these distributions, without importing them; absent ones are left out."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision(folder: Path) -> dict[str, Any] | None:
    """{"revision": sha, "dirty": do tracked files differ from it}; None outside a repository or without git."""
    revision = _git(folder, "rev-parse", "--verify", "HEAD")
    if not revision:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"revision": revision, "dirty": None if changes is None else bool(changes)}


def hash_file(path: Path) -> str:
    """sha256 of a file's content, read in pieces."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AlignzooError(f"{path}: cannot be read", why=str(error)) from error


def hash_folder(path: Path, patterns: Sequence[str] = ("**/*",)) -> str:
    """sha256 of the files under `path` that match a glob: of their relative names and contents, not of the place.

    Raises AlignzooError where none matches, since the hash of nothing would look like a hash of something.
    """
    files = {found for pattern in patterns for found in path.glob(pattern) if found.is_file()}
    if not files:
        raise AlignzooError(f"{path}: no file matches {', '.join(patterns)}", fix="name a folder that holds such files")
    digest = hashlib.sha256()
    for name, file in sorted((file.relative_to(path).as_posix(), file) for file in files):
        digest.update(f"{name}\0{hash_file(file)}\n".encode())
    return digest.hexdigest()


def _git(folder: Path, *words: str) -> str | None:
    """What a git command prints about a folder, None where it fails. It takes no lock and runs no file monitor."""
    git = shutil.which("git")
    if git is None:
        return None
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"GIT_OPTIONAL_LOCKS": "0"}
    command = [git, "-c", "core.fsmonitor=false", *words]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else None


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        return None
    return record if isinstance(record, dict) else None


def _is_cut(path: Path) -> bool:
    """Does the file end within a line?"""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _cannot_write(path: Path, error: OSError, fix: str = "") -> AlignzooError:
    return AlignzooError(
        f"{path}: cannot be written to", why=str(error), fix=fix or "free space, or permit writing there"
    )
