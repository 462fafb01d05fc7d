"""Checkpoints as files: one format for every ZeRO stage and every number of ranks; safetensors and JSON, no pickle.

    step-40/
      manifest.json                 format, step, size and sha256 of every file, file, dtype and shape of every tensor
      weights-00001.safetensors     a part of the tensors, in files of at most SHARD_BYTES
      optimizer-00001.safetensors   another
      state.json                    small state

A checkpoint is written aside as .step-40.partial and renamed when all of it is on the disk: it is complete or not
there. One process writes; this module knows nothing of ranks.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from alignzoo.errors import AlignzooError, RunError
from alignzoo.progress import Say
from alignzoo.rundir import hash_file

FORMAT = 1  # grows when a reader of the one before would be misled
SHARD_BYTES = 2 * 1024**3  # of the tensors in one file, and so of the memory that writing takes
MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d+)")
_LEFT_OVER = re.compile(r"\.step-\d+\.(partial|removed)")


class DamagedCheckpoint(AlignzooError):
    """A checkpoint is not what was written: a file is missing, cut or changed."""

    @classmethod
    def of(cls, file: Path, what: str) -> DamagedCheckpoint:
        return cls(f"{file}: {what}", why="the checkpoint is damaged", fix="take the checkpoint before")


# --- writing ---------------------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Writes one checkpoint, tensor by tensor. Used as a context: what is not finished at its end is removed.

    folder: where the checkpoints are; a checkpoint of the same step, from before a resume, is replaced
    A write that fails is remembered: `add` does nothing more, and `finish` raises it. So the ranks that gather together
    with this one are not left waiting for it.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.target, self.step = folder / f"step-{step}", step
        self._partial = folder / f".step-{step}.partial"
        self._files: dict[str, dict[str, Any]] = {}
        self._tensors: dict[str, dict[str, dict[str, Any]]] = {}
        self._shards: dict[str, _Shard] = {}
        self._failure: Exception | None = None
        self._attempt(self._begin)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    def add(self, part: str, name: str, tensor: Tensor) -> None:
        """One more tensor of a part ("weights", "optimizer"); copied, so that the caller may change it at once."""
        index = self._tensors.setdefault(part, {})
        if name in index:
            raise ValueError(f"{part}: {name} is added twice")
        shard = self._shards.setdefault(part, _Shard())
        size = tensor.numel() * tensor.element_size()
        if shard.tensors and shard.size + size > SHARD_BYTES:
            self._attempt(lambda: self._flush(part, shard))
        dtype = str(tensor.dtype).removeprefix("torch.")
        index[name] = {"file": shard.name(part), "dtype": dtype, "shape": list(tensor.shape)}
        if self._failure is None:
            shard.tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
            shard.size += size

    def add_json(self, name: str, data: Any) -> None:
        """A file name.json. Floats come back bit for bit, also those that are not finite; tuples come back as lists."""
        _check_keys(data, name)
        # Not strict JSON: a schedule may hold an infinity, and only `CheckpointReader.json` reads it.
        self._attempt(lambda: self._write(f"{name}.json", json.dumps(data, indent=1, ensure_ascii=False) + "\n"))

    def finish(self) -> Path:
        """The folder of the checkpoint, on the disk. Raises RunError where a write failed; then nothing of it stays."""
        self._attempt(self._complete)
        if self._failure is None:
            return self.target
        self.abandon()
        raise RunError(
            f"{self.target}: the checkpoint could not be written",
            why=str(self._failure),
            fix="free space on the disk, lower checkpoint.keep, or permit writing there; then go on with "
            "`alignzoo run RECIPE --resume`: the checkpoints before this one are as they were",
        ) from self._failure

    def abandon(self) -> None:
        """Removes what was written and not finished."""
        self._shards.clear()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _attempt(self, write: Callable[[], None]) -> None:
        if self._failure is None:
            try:
                write()
            except (OSError, SafetensorError) as error:
                self._failure = error
                self.abandon()

    def _begin(self) -> None:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        if self._partial.exists():  # of a run that was killed at this step
            shutil.rmtree(self._partial)
        self._partial.mkdir()

    def _flush(self, part: str, shard: _Shard) -> None:
        path = self._partial / shard.name(part)
        save_file(shard.tensors, path)
        path.chmod(self._partial.stat().st_mode & 0o666)  # safetensors makes it readable for its owner alone
        shard.tensors, shard.size, shard.number = {}, 0, shard.number + 1
        self._written(path)

    def _write(self, name: str, text: str) -> None:
        path = self._partial / name
        path.write_text(text, encoding="utf-8")
        self._written(path)

    def _written(self, path: Path) -> None:
        _sync(path)
        self._files[path.name] = {"size": path.stat().st_size, "sha256": hash_file(path)}

    def _complete(self) -> None:
        for part, shard in self._shards.items():
            if shard.tensors:
                self._flush(part, shard)
        self._write(MANIFEST, _sealed(self._manifest()))
        _sync(self._partial)
        if self.target.exists():
            _remove(self.target, lambda: self._partial.rename(self.target))
        else:
            self._partial.rename(self.target)
        _sync(self.target.parent)

    def _manifest(self) -> dict[str, Any]:
        from alignzoo import __version__

        return {
            "format": FORMAT,
            "alignzoo": __version__,
            "step": self.step,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "files": self._files,
            "tensors": self._tensors,
        }


@dataclass
class _Shard:
    """The tensors of a part that wait for their file."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    size: int = 0  # bytes
    number: int = 1

    def name(self, part: str) -> str:
        return f"{part}-{self.number:05d}.safetensors"


def _check_keys(data: Any, name: str) -> None:
    """JSON turns other keys into strings in silence."""
    if isinstance(data, Mapping):
        wrong = [key for key in data if not isinstance(key, str)]
        if wrong:
            raise TypeError(f"{name}: the key {wrong[0]!r} is no string")
    if isinstance(data, Mapping | list | tuple):
        for value in data.values() if isinstance(data, Mapping) else data:
            _check_keys(value, name)


def _sealed(manifest: Mapping[str, Any]) -> str:
    return json.dumps({**manifest, "sha256": _seal(manifest)}, indent=1, ensure_ascii=False) + "\n"


def _seal(manifest: Mapping[str, Any]) -> str:
    """sha256 of a manifest's content but for the seal itself."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Returns when the file, or the names in the folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks know no folders
            raise
    finally:
        os.close(handle)


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckpointReader:
    """A checkpoint that was opened, see `open_checkpoint`. Tensors are read when they are asked for."""

    folder: Path
    manifest: Mapping[str, Any] = field(repr=False)

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry["size"] for entry in self.manifest["files"].values())

    def names(self, part: str) -> list[str]:
        """The names of a part's tensors in the order in which they were added; [] for a part without any."""
        return list(self.manifest["tensors"].get(part, {}))

    def tensors(self, part: str) -> Iterator[tuple[str, Tensor]]:
        """All tensors of a part, one after the other, on the CPU. They are views of the file: copy what is kept."""
        by_file: dict[str, list[str]] = {}
        for name, entry in self.manifest["tensors"].get(part, {}).items():
            by_file.setdefault(entry["file"], []).append(name)
        for file, names in by_file.items():
            with safe_open(self.folder / file, framework="pt") as shard:
                for name in names:
                    yield name, shard.get_tensor(name)

    def tensor(self, part: str, name: str) -> Tensor:
        """One tensor. Raises KeyError where the part has none of that name."""
        entry = self.manifest["tensors"][part][name]
        with safe_open(self.folder / entry["file"], framework="pt") as shard:
            return shard.get_tensor(name)  # type: ignore[no-any-return]

    def json(self, name: str) -> Any:
        """What `add_json` wrote. Raises AlignzooError where there is none of that name."""
        if f"{name}.json" not in self.manifest["files"]:
            raise AlignzooError(
                f"{self.folder}: holds no {name}.json",
                why=f"alignzoo {self.manifest['alignzoo']} wrote it",
                fix="go on with the version that wrote it",
            )
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))


def open_checkpoint(folder: Path, verify: bool = True) -> CheckpointReader:
    """A checkpoint, its manifest and its files checked. Raises DamagedCheckpoint that names the file.

    verify: also the sha256 of every file, which reads them all; without it only the manifest and the sizes
    Raises AlignzooError for a format that this version does not know.
    """
    reader = CheckpointReader(folder, _read_manifest(folder))
    for name, entry in reader.manifest["files"].items():
        _check_file(folder / name, entry, verify)
    return reader


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise DamagedCheckpoint.of(file, "is missing") from error
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint.of(file, f"cannot be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("sha256") != _seal(manifest):
        raise DamagedCheckpoint.of(file, "was changed after it was written")
    if manifest["format"] != FORMAT:
        raise AlignzooError(
            f"{folder}: a checkpoint of format {manifest['format']}, and this version reads {FORMAT}",
            why=f"alignzoo {manifest['alignzoo']} wrote it",
            fix="use that version",
        )
    step = _STEP.fullmatch(folder.name)
    if step and int(step[1]) != manifest["step"]:
        raise DamagedCheckpoint.of(file, f"is of step {manifest['step']}, and the folder is {folder.name}")
    return manifest


def _check_file(file: Path, entry: Mapping[str, Any], verify: bool) -> None:
    try:
        size = file.stat().st_size
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise DamagedCheckpoint.of(file, "is missing" if missing else f"cannot be read ({error})") from error
    if size != entry["size"]:
        raise DamagedCheckpoint.of(file, f"has {size:,} bytes, and {entry['size']:,} were written")
    if verify and hash_file(file) != entry["sha256"]:
        raise DamagedCheckpoint.of(file, "its content is not what was written (sha256 differs)")


# --- the folder of checkpoints ---------------------------------------------------------------------------------------


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders step-N, the newest first, damaged ones too."""
    found = [(int(m[1]), path) for path in _children(folder) if path.is_dir() and (m := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def latest_checkpoint(folder: Path, say: Say) -> CheckpointReader | None:
    """The newest checkpoint that is complete and undamaged, verified; None where there is none.

    A damaged one is named, and the one before it is taken.
    """
    for path in checkpoints_in(folder):
        try:
            size = open_checkpoint(path, verify=False).size
            say(f"checking the hashes of {path} ({size / 1e9:.2f} GB)")
            return open_checkpoint(path)
        except DamagedCheckpoint as error:
            say(f"WARNING: a damaged checkpoint is passed over: {error.what}")
    return None


def remove_left_overs(folder: Path, say: Say) -> None:
    """Removes what a killed run left of a checkpoint that it was writing or removing. For the start of a run."""
    for path in _children(folder):
        if _LEFT_OVER.fullmatch(path.name):
            shutil.rmtree(path)
            say(f"removed {path}: an interruption left it")


def remove_after(folder: Path, step: int, say: Say) -> None:
    """Removes the checkpoints of later steps: a run that goes on from `step` makes other ones."""
    for path in checkpoints_in(folder):
        if int(path.name.removeprefix("step-")) > step:
            _remove(path)
            say(f"removed {path}: the run goes on from step {step}")


def prune(folder: Path, keep: int, say: Say, *, written: Path | None = None) -> None:
    """Removes all checkpoints but the newest `keep`.

    Damaged ones are not counted, so the only good one always stays, and so does `written`, the one that was just made.
    Only manifests and sizes are looked at: hashes would read all files at each save.
    """
    good = 0 if written is None else 1
    for path in checkpoints_in(folder):
        if path == written:
            continue
        if good >= keep:
            _remove(path)
            say(f"removed {path} (checkpoint.keep = {keep})")
        good += _looks_whole(path)


def _looks_whole(path: Path) -> bool:
    try:
        open_checkpoint(path, verify=False)
    except AlignzooError:
        return False
    return True


def _remove(path: Path, between: Callable[[], object] = lambda: None) -> None:
    """Out of sight first, so that a kill leaves no half checkpoint that looks whole.

    between: done while it is out of sight; it comes back where that fails
    """
    aside = path.with_name(f".{path.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    try:
        between()
    except OSError:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)  # what a network disk still holds on to goes at the next start


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
