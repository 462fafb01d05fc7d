"""`alignzoo reproduce`: the first steps of a run made again, and compared with what it recorded."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from alignzoo.errors import AlignzooError, RunError
from alignzoo.progress import Say
from alignzoo.recipe import load_recipe
from alignzoo.records import Record, is_eval, number
from alignzoo.resume import changed_names, other_versions
from alignzoo.rundir import RunDir
from alignzoo.runner import Enough, run

ROUNDING = {True: 1e-3, False: 3e-2}  # relative difference that is rounding: with float32 throughout, or not
# what depends on the machine, on the cut into micro-batches, or on whether the reference was in the cache
_NOT_COMPARED = (
    "tokens_per_second", "memory", "eval_runtime", "padding_fraction", "shared_fraction", "reference/drift",
    "reference/drift_mean", "non_finite", "rollout/seconds_sampling", "rollout/seconds_rewards",
)  # fmt: skip
_FLOOR = 1e-3  # differences are relative to the value or to this, whichever is larger: 1e-7 for 0 is no 100 %


@dataclass(frozen=True)
class Apart:
    """One number of the records that differs."""

    step: int
    name: str
    then: float | None
    now: float | None

    @property
    def relative(self) -> float:
        if self.then is None or self.now is None:
            return float("inf")
        return abs(self.now - self.then) / max(abs(self.then), _FLOOR)


def reproduce(run_dir: Path, steps: int, say: Say, console: Console | None = None) -> list[Apart]:
    """Runs the recipe of a run for some steps in a folder that is removed, and says what is the same.

    Returns the numbers that differ, the furthest first; [] where all are the same to the last bit. Raises RunError
    where one differs by more than rounding, AlignzooError where the run cannot be made again.
    """
    before = RunDir(run_dir)
    manifest, recorded = before.read_manifest(), before.read_metrics()
    then = _first(recorded, steps)
    if manifest.get("live"):
        raise AlignzooError(
            f"{run_dir}: cannot be made again", why=f"{', '.join(manifest['live'])}: given as objects from Python"
        )
    if not any("loss" in record for record in then):
        raise AlignzooError(f"{run_dir}: has no record of its first {steps} steps", fix="raise --steps")
    with tempfile.TemporaryDirectory(prefix="alignzoo-") as folder:
        again = _run(before, max(int(record["step"]) for record in then), Path(folder), console or Console())
        now, made_from = again.read_metrics(), again.read_manifest()
    same = list(_inputs(manifest, made_from, say))
    apart = sorted(_differences(then, _first(now, steps)), key=lambda one: -one.relative)
    _tell(run_dir, then, apart, all(same), _exact(before), say)
    return apart


def _run(before: RunDir, steps: int, folder: Path, console: Console) -> RunDir:
    overrides = {"output.dir": str(folder), "log.run_name": "again", "log.trackers": [], "callbacks": [],
                 "samples.prompts": [], "samples.from_eval": 0, "checkpoint.every_steps": 10**9}  # fmt: skip
    recipe = load_recipe(before.path / "recipe.toml", overrides)
    plugins = sorted((before.path / "plugins").glob("*.py"))
    with suppress(Enough):
        run(recipe, plugins=plugins, console=console, stop_after=steps)
    return RunDir(folder / "again")


def _first(records: Sequence[Record], steps: int) -> list[Record]:
    """The records up to a step; of a run that logs less often, up to its first record of training."""
    logged = min((int(r["step"]) for r in records if "loss" in r), default=steps)
    return [record for record in records if int(record["step"]) <= max(steps, logged)]


def _inputs(before: Mapping[str, Any], now: Mapping[str, Any], say: Say) -> Iterator[bool]:
    """Says what of versions, data, start model and plugin differs; True for each that is the same."""
    versions = list(other_versions(before, now))
    for line in versions:
        say(line)
    if not versions:
        say("the same versions of libraries")
    yield not versions
    for what, name in (("data", "data"), ("weights", "start model")):
        changed = list(changed_names(before[what], now[what]))
        say(f"WARNING: the {name} differs: {', '.join(changed)}" if changed else f"the same {name} (sha256)")
        yield not changed
    plugins = [
        [{k: p.get(k) for k in ("loss", "distribution", "version")} for p in m["plugins"]] for m in (before, now)
    ]
    say("the same plugin" if plugins[0] == plugins[1] else f"WARNING: the plugin differs: {plugins[0]} -> {plugins[1]}")
    yield plugins[0] == plugins[1]


def _differences(then: Sequence[Record], now: Sequence[Record]) -> Iterator[Apart]:
    """Numbers that are not the same, record by record. An evaluation at the end of a step is a record of its own."""
    found = {(record["step"], is_eval(record)): record for record in now}
    for record in then:
        other = found.get((record["step"], is_eval(record)), {})
        for name in record:
            if name.removeprefix("eval_") not in _NOT_COMPARED and name not in _NOT_COMPARED:
                one = Apart(int(record["step"]), name, number(record[name]), number(other.get(name)))
                if one.then != one.now:
                    yield one


def _exact(run_dir: RunDir) -> bool:
    recipe = load_recipe(run_dir.path / "recipe.toml")
    return recipe.model.dtype == "float32" and recipe.engine.precision in ("auto", "fp32")


def _tell(
    run_dir: Path, then: Sequence[Record], apart: Sequence[Apart], same_inputs: bool, exact: bool, say: Say
) -> None:
    losses = [f"{r['loss']:.6g}" for r in then if "loss" in r]
    what = f"{len(then)} records to step {then[-1]['step']} (loss {', '.join(losses)})"
    if not apart:
        say(f"reproduced: {what}: all numbers are the same to the last bit")
        return
    worst, limit = apart[0], ROUNDING[exact]
    words = f"step {worst.step}, {worst.name}: {worst.then} then, {worst.now} now"
    if worst.relative <= limit:
        say(f"reproduced up to rounding: {what}: {len(apart)} numbers differ, the furthest at {words}")
        return
    for one in apart[:10]:
        say(f"  step {one.step}  {one.name}: {one.then} then, {one.now} now")
    raise RunError(
        f"{run_dir}: not reproduced: {len(apart)} numbers differ, the furthest at {words}",
        why="its versions, data, start model or plugin differ, see above" if not same_inputs else
        f"more than rounding, which is {limit:g} here: another machine, other numerics, or a change of the code",
    )  # fmt: skip
