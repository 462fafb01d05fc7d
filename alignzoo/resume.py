"""Which run goes on, and whether it is still the same one: its recipe, its data, its start model, its plugin.

It imports no torch. What a run was made from is in its directory: recipe.toml and manifest.json.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignzoo.errors import AlignzooError, DataError, ModelError, PluginError, RecipeError
from alignzoo.recipe import Recipe, load_recipe, to_table
from alignzoo.rundir import METRICS, RunDir, run_name
from alignzoo.schema import show

if TYPE_CHECKING:
    from alignzoo.progress import Say

# sections that do not change what is learned
FREE = ("engine", "checkpoint", "eval", "watch", "samples", "log", "output", "callbacks")
_NO_TOTAL = ("constant",)  # schedules that do not depend on the number of steps
_NO_TOTAL_WARMED = ("constant_with_warmup", "inverse_sqrt")  # nor do these, where train.warmup_steps is given
_LENGTH = ("train.epochs", "train.max_steps")
NEW_RUN = (
    "put these keys back; or start a new run from the checkpoint: `alignzoo export RUN --to DIR`, and model.path = DIR"
)
ABSENT = object()

# --- which run -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resumable:
    """A run that can go on. checkpoint: the folder that was named; None for the newest that is not damaged."""

    run_dir: RunDir
    checkpoint: Path | None = None


def find_run(recipe: Recipe, what: Path | None, say: Say) -> Resumable:
    """The run to go on with: the one that `what` names, or the newest unfinished one of this recipe below output.dir.

    what: a run directory, or checkpoints/step-N in one
    Raises AlignzooError where there is none, or where it came to its end.
    """
    beside = recipe.tables.folder  # `alignzoo run RUN/recipe.toml --resume` means that run
    if what is None and recipe.tables.file is not None and _is_run(beside):
        what = beside
    return _newest(recipe, say) if what is None else _named(what)


def _named(what: Path) -> Resumable:
    parent = what.resolve().parent
    is_step = parent.name == "checkpoints" and what.is_dir()
    run_dir = RunDir(parent.parent if is_step else what)
    if not _is_run(run_dir.path):
        raise AlignzooError(
            f"--resume {what}: no run directory",
            why=f"{run_dir.path} holds no recipe.toml and manifest.json",
            fix="name a run directory, or checkpoints/step-N in one",
        )
    if run_dir.finished:
        raise AlignzooError(
            f"{run_dir.path}: the run came to its end, there is nothing to resume",
            fix=f'start a new run from its model: --set model.path="run:{run_dir.path}"',
        )
    return Resumable(run_dir, what if is_step else None)


def _newest(recipe: Recipe, say: Say) -> Resumable:
    base = Path(recipe.output.dir)
    runs = _runs_of(recipe, base)
    open_runs = [run for run in runs if not run.finished]
    if not open_runs:
        ended = (
            f"all {len(runs)} came to their end"
            if runs
            else f"no {recipe.log.run_name or _stem(recipe) + 'DATE-TIME'} is there"
        )
        raise AlignzooError(
            f"{base}: no run of {recipe.name} that could go on",
            why=ended,
            fix="name the run directory: --resume DIR; or start anew without --resume",
        )
    if len(open_runs) > 1:
        say(f"{len(open_runs)} runs of {recipe.name} did not come to their end: the newest goes on")
    return Resumable(open_runs[0])


def _runs_of(recipe: Recipe, base: Path) -> list[RunDir]:
    """The directories that runs of this recipe made, the newest first."""
    pattern = _pattern(recipe)
    runs = [RunDir(p) for p in base.iterdir() if pattern.fullmatch(p.name) and _is_run(p)] if base.is_dir() else []
    return sorted(runs, key=_age, reverse=True)


def _age(run: RunDir) -> tuple[str, int, str]:
    """By start; of two in the same second, name-10 is after name-9."""
    return str(run.read_manifest().get("started", "")), len(run.path.name), run.path.name


def _pattern(recipe: Recipe) -> re.Pattern[str]:
    """The names that this recipe's runs get, see rundir.run_name."""
    if recipe.log.run_name is not None:
        return re.compile(re.escape(recipe.log.run_name) + r"(-\d+)?")
    return re.compile(re.escape(_stem(recipe)) + r"\d{8}-\d{6}(-\d+)?")


def _stem(recipe: Recipe) -> str:
    """What the default name of a run has before the time."""
    losses = "+".join(choice.name for choice in recipe.losses)
    return run_name(recipe.name, losses, datetime(2000, 1, 1)).removesuffix("20000101-000000")


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.toml").is_file() and (folder / "manifest.json").is_file()


# --- the same recipe -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One key of two tables that differs. ABSENT where a table lacks it."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.before)} -> {_shown(self.now)}"


def table_of(run_dir: RunDir) -> dict[str, Any]:
    """The resolved recipe that a run was made with, as recipe.to_table gives it; keys it lacked have their defaults."""
    return to_table(load_recipe(run_dir.path / "recipe.toml"))


def recipe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What differs between two resolved tables (recipe.to_table) and may: to be shown.

    Free are the sections FREE, and more train.epochs or train.max_steps where the schedule does not depend on them.
    Raises RecipeError that lists every other difference.
    """
    changes = list(differences(before, now))
    fixed = [c for c in changes if c.key.split(".")[0] not in FREE]
    if _is_longer(before, now) and _keeps_its_rate(now):
        fixed = [c for c in fixed if c.key not in _LENGTH]
    if not fixed:
        return changes
    why = "a run that goes on learns the same from the same; free are " + ", ".join(f"[{name}]" for name in FREE)
    if any(c.key in _LENGTH for c in fixed):
        why += (
            "; train.epochs and train.max_steps may grow with train.lr_scheduler = "
            + '"constant", or "constant_with_warmup" with warmup_steps, since other schedules depend on the total'
        )
    lines = [f"  {change}" for change in fixed]
    raise RecipeError("\n".join(["the recipe is not the one that the run began with:", *lines]), why=why, fix=NEW_RUN)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """The keys of two resolved tables whose values differ."""
    flat_before, flat_now = dict(flat(before)), dict(flat(now))
    for key in dict.fromkeys([*flat_before, *flat_now]):
        change = Change(key, flat_before.get(key, ABSENT), flat_now.get(key, ABSENT))
        if _comparable(change.before) != _comparable(change.now):
            yield change


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of nested tables by its dotted name."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _comparable(value: Any) -> Any:
    return [_comparable(v) for v in value] if isinstance(value, list | tuple) else value


def _shown(value: Any) -> str:
    return "not given" if value is ABSENT else show(value)


def _is_longer(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Neither the epochs nor the steps became fewer."""

    def length(table: Mapping[str, Any]) -> tuple[float, float]:
        train = table["train"]
        return train.get("epochs", 1), train.get("max_steps", math.inf)

    return all(n >= b for b, n in zip(length(before), length(now), strict=True))


def _keeps_its_rate(table: Mapping[str, Any]) -> bool:
    """Are the learning rate and the loss of a step the same, however many steps follow?"""
    train = table["train"]
    if any(isinstance(value, Mapping) and "schedule" in value for value in table["loss"].values()):
        return False
    name = train.get("lr_scheduler")
    return name in _NO_TOTAL or (name in _NO_TOTAL_WARMED and "warmup_steps" in train)


# --- the same data, start model and plugin ---------------------------------------------------------------------------


def check_inputs(before: Mapping[str, Any], now: Mapping[str, Any], say: Say) -> None:
    """Compares two manifests (rundir.manifest). Other versions of libraries and plugins are said.

    Raises DataError, ModelError or PluginError that names the source, the file of weights or the plugin file that
    changed: the run would not go on but become another one.
    """
    changed = list(changed_names(before["data"], now["data"]))
    if changed:
        raise DataError(
            "the data is not what the run began with: " + ", ".join(changed),
            why="its sha256 differs from the one in manifest.json",
            fix="put the data back, or start a new run",
        )
    if not before["weights"] or not now["weights"]:
        say("the hashes of the start model are not known: whether it is the same is not checked")
    else:
        changed = list(changed_names(before["weights"], now["weights"]))
        if changed:
            raise ModelError(
                "the start model is not what the run began with: " + ", ".join(changed),
                why="its sha256 differs from the one in manifest.json",
                fix="put the model back, or start a new run",
            )
    _check_plugins(before["plugins"], now["plugins"], say)
    for line in other_versions(before, now):
        say(line)


def changed_names(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """The names whose hash differs, and how."""
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            yield name if name in before and name in now else f"{name} ({'new' if name in now else 'no longer used'})"


def _check_plugins(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]], say: Say) -> None:
    for old, new in zip(before, now, strict=True):
        what = " ".join(f'{kind} "{new[kind]}"' for kind in ("loss", "reward", "format") if kind in new)
        if old["distribution"] != new["distribution"]:
            raise PluginError(
                f"the {what} came from {_owner(old)}, and now comes from {_owner(new)}",
                fix="give the plugin that the run began with, or start a new run",
            )
        if old["distribution"] == "file" and old["version"] != new["version"]:
            raise PluginError(
                f"the plugin file of the {what} was changed: {old['version']} -> {new['version']}",
                fix="give the file as it was, there is a copy in plugins/ of the run directory; or start a new run",
            )
        if old["distribution"] == "python":
            say(f"the {what} comes from Python: whether it is the same is not checked")
        elif old["version"] != new["version"]:
            say(f"WARNING: the plugin of the {what} is {_owner(new)}, the run began with {old['version']}")


def _owner(plugin: Mapping[str, Any]) -> str:
    return f"{plugin['distribution']} {plugin['version']}".strip()


def other_versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """A warning where two manifests name other versions of libraries."""
    old = {"alignzoo": before["alignzoo"], "python": before["python"], **before["versions"]}
    new = {"alignzoo": now["alignzoo"], "python": now["python"], **now["versions"]}
    other = [
        f"{k} {old.get(k, 'absent')} -> {new.get(k, 'absent')}" for k in {**old, **new} if old.get(k) != new.get(k)
    ]
    if other:
        yield "WARNING: other versions than at the start, so numbers may differ in rounding: " + ", ".join(other)


# --- the directory made ready ----------------------------------------------------------------------------------------


def make_ready(run_dir: RunDir, metrics_bytes: int, say: Say) -> None:
    """Takes out of the run directory what came after the checkpoint: lines of metrics, and an end that was begun.

    metrics_bytes: RunDir.sync_metrics() at the checkpoint; 0 for a run that starts again from its first step
    """
    cut = run_dir.trim_metrics(metrics_bytes)
    if cut:
        say(f"{METRICS}: {cut} lines after the checkpoint are cut, the run writes them again")
    for name in ("model", "adapter", "best-new"):  # saved, and killed before the closing figures; best/ half replaced
        if (run_dir.path / name).is_dir():
            shutil.rmtree(run_dir.path / name)
            say(f"removed {run_dir.path / name}: the run was interrupted there, and saves it again")


def note_resume(
    run_dir: RunDir, *, step: int, command: Sequence[str], table: Mapping[str, Any], changes: Sequence[Change]
) -> None:
    """manifest.json gets a line in "resumed", recipe.toml the keys that changed."""
    manifest = run_dir.read_manifest()
    line = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": list(command),
        "changes": [str(change) for change in changes],
    }
    run_dir.write_json("manifest.json", {**manifest, "resumed": [*manifest.get("resumed", []), line]})
    if changes:
        run_dir.write_recipe(table)
