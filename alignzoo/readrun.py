"""A run as its directory tells of it: what reports and comparisons are made from. It imports no torch."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignzoo.errors import AlignzooError
from alignzoo.evalrows import EvalRows, read_eval_rows
from alignzoo.records import Record, Sample
from alignzoo.rundir import RunDir

SAMPLES, LOG = "samples.jsonl", "log.txt"


@dataclass(frozen=True, eq=False)
class Run:
    """The files of a run directory. What is not there is empty."""

    path: Path
    recipe: Mapping[str, Any]  # the resolved one
    manifest: Mapping[str, Any]
    summary: Mapping[str, Any]
    records: Sequence[Record]
    samples: list[Sample]
    rows: EvalRows | None
    said: list[str]  # what the run has said, a line each

    @property
    def loss(self) -> str:
        return "+".join(str(table.get("name", "?")) for table in self.losses) or str(self.summary.get("loss", "?"))

    @property
    def losses(self) -> list[Mapping[str, Any]]:
        """The [loss] tables of the recipe."""
        found = self.recipe.get("loss", [])
        return list(found) if isinstance(found, list) else [found]

    @property
    def seed(self) -> int:
        return int(self.manifest.get("seed", 0))

    @property
    def warnings(self) -> list[str]:
        return [line.removeprefix("WARNING: ") for line in self.said if line.startswith("WARNING: ")]


def read_run(path: Path, summary: Mapping[str, Any] | None = None) -> Run:
    """The run in a directory. summary: the closing figures, where they are not written yet."""
    try:
        recipe = tomllib.loads(_text(path / "recipe.toml"))
        manifest = json.loads(_text(path / "manifest.json") or "{}")
        figures = json.loads(_text(path / "summary.json") or "{}") if summary is None else summary
        samples = [Sample(**json.loads(line)) for line in _text(path / SAMPLES).split("\n") if line]
        said = _text(path / LOG).splitlines()
    except (OSError, ValueError, TypeError) as error:
        raise AlignzooError(f"{path}: a file of the run cannot be read", why=str(error)) from error
    return Run(path, recipe, manifest, figures, RunDir(path).read_metrics(), samples, read_eval_rows(path), said)


def read_finished(path: Path) -> Run:
    """As `read_run`; raises AlignzooError where the folder is no run that came to its end."""
    RunDir(path).read_manifest()
    if not RunDir(path).finished:
        raise AlignzooError(
            f"{path}: the run did not come to its end",
            why="model/ or summary.json is missing",
            fix=f"go on with it: alignzoo run {path / 'recipe.toml'} --resume",
        )
    return read_run(path)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
