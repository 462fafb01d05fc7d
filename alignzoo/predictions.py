"""What `alignzoo plan` has predicted, and what the runs took: a JSON file in the cache's folder."""

from __future__ import annotations

import hashlib
import json
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignzoo.data.cache import base_folder
from alignzoo.errors import AlignzooError
from alignzoo.readrun import Run, read_run
from alignzoo.rundir import RunDir, atomic_write

FILE = "predictions.json"
KEPT = 100
_FREE = ("output", "log", "watch")  # sections that time and memory do not depend on
Entry = dict[str, Any]


def recipe_hash(table: Mapping[str, Any]) -> str:
    """Of a resolved recipe, as run directories have it, without what changes neither time nor memory."""
    used = {name: section for name, section in table.items() if name not in _FREE}
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()


def keep(key: str, output: Path, steps: int, seconds: float | None, reference: float, memory: float) -> None:
    """Writes a prediction down; an older one of the same recipe that no run has answered yet gives way.

    seconds: of the training with its evaluations, None where no probe was made; reference: seconds of its pass
    memory: GiB at the peak
    """
    entries = [e for e in _read() if e["key"] != key or e["took"]]
    entries.append(
        {"key": key, "made": time.time(), "output": str(output.absolute()), "steps": steps, "seconds": seconds,
         "reference": reference, "memory": memory, "took": None}
    )  # fmt: skip
    _write(entries[-KEPT:])


def settle() -> list[Entry]:
    """Looks for the runs that answer predictions; returns those that were answered, the oldest first."""
    entries = _read()
    for entry in entries:
        if entry["took"] is None:
            entry["took"] = _took(entry)
    _write(entries)
    return [entry for entry in entries if entry["took"]]


def errors(answered: Sequence[Entry]) -> tuple[float | None, float | None]:
    """Mean relative errors of time and memory."""
    time_off = [abs(_expected(e) / _spent(e) - 1) for e in answered if e["seconds"] is not None]
    memory_off = [abs(e["memory"] / e["took"]["memory"] - 1) for e in answered if e["took"].get("memory")]
    return tuple(sum(off) / len(off) if off else None for off in (time_off, memory_off))  # type: ignore[return-value]


def _expected(entry: Entry) -> float:
    """Of the reference's pass only what the run had to compute: the rest came from its cache."""
    return float(entry["seconds"] + entry["reference"] * entry["took"]["computed"])


def _spent(entry: Entry) -> float:
    return float(entry["took"]["seconds"] + entry["took"]["reference"])


def _took(entry: Entry) -> Entry | None:
    """What the first run of the recipe took that came to its end after the prediction was made."""
    found = sorted(Path(entry["output"]).glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    for path in found:
        if path.stat().st_mtime > entry["made"] and _is_of(path.parent, entry):
            summary = json.loads(path.read_text(encoding="utf-8"))
            cache = summary.get("reference_cache") or {}
            share = cache.get("computed", 0) / max(cache.get("completions", 0), 1)
            return {
                "run": str(path.parent), "seconds": summary["seconds"], "memory": summary.get("memory"),
                "computed": share, "reference": cache.get("seconds", 0.0) if share else 0.0,
            }  # fmt: skip
    return None


def _is_of(folder: Path, entry: Entry) -> bool:
    """Whether a run is the one that was predicted: the same recipe, whole, uninterrupted, in one process."""
    try:
        table = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
        run: Run = read_run(folder)
    except (OSError, ValueError, AlignzooError):
        return False
    several = any(line.startswith("engine: ") and " processes, " in line for line in run.said)
    whole = run.summary.get("steps") == entry["steps"] and "resumed" not in run.manifest
    return RunDir(folder).finished and whole and not several and recipe_hash(table) == entry["key"]


def _read() -> list[Entry]:
    """A file that cannot be read is begun anew: nothing but these figures is lost."""
    try:
        found = json.loads((base_folder() / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return []
    return found if isinstance(found, list) else []


def _write(entries: Sequence[Entry]) -> None:
    if entries:
        base_folder().mkdir(parents=True, exist_ok=True)
        atomic_write(base_folder() / FILE, json.dumps(list(entries), indent=1).encode())
