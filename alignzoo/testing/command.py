"""Behind `alignzoo conform`: which losses, and the author's reference function out of a file."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path

from alignzoo.errors import PluginError
from alignzoo.plugin_kinds import LossInfo
from alignzoo.plugins import Registry
from alignzoo.testing.kit import Oracle
from alignzoo.testing.suite import Result, examine


def conform(
    registry: Registry, names: Sequence[str], every: bool, reference: Path | None, fixtures: Path | None
) -> list[Result]:
    """The results of all checks. Raises PluginError for an unknown name, or where no loss is meant."""
    losses = _chosen(registry, names, every)
    if len(losses) > 1 and (reference or fixtures):
        raise PluginError("--reference and --fixtures are for one loss", fix="name the loss that they belong to")
    function = None if reference is None else _function(reference)
    return [result for info in losses for result in examine(info.cls, reference=function, fixtures=fixtures)]


def _chosen(registry: Registry, names: Sequence[str], every: bool) -> list[LossInfo]:
    if names and not every:
        return [registry.get(name) for name in dict.fromkeys(names)]
    known = [registry.get(name) for name in registry.losses()]
    chosen = [info for info in known if every or info.distribution == "file"]
    if not chosen or (names and every):
        raise PluginError("conform: which losses?", fix="give names, --plugin FILE, or --all")
    return chosen


def _function(path: Path) -> Oracle:
    try:
        found = runpy.run_path(str(path)).get("reference")
    except Exception as error:
        raise PluginError(f"the file {path} cannot be run: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise PluginError(f"the file {path} has no function reference(batch, settings)")
    return found  # type: ignore[no-any-return]
