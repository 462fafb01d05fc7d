"""`alignzoo doctor RUN`: what is, or was, wrong with a run, by its directory alone: no weights, no data."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

from alignzoo import __version__
from alignzoo.api import Loss
from alignzoo.check import find_loss
from alignzoo.errors import AlignzooError
from alignzoo.observer import known_of
from alignzoo.plugins import discover
from alignzoo.progress import Say
from alignzoo.recipe import Recipe, load_recipe
from alignzoo.records import Record
from alignzoo.resume import other_versions
from alignzoo.rundir import NON_FINITE, RunDir, versions
from alignzoo.symptoms import Symptoms


def examine(folders: Sequence[Path], say: Say) -> int:
    """Tells what is wrong with each run, and gives how many things that is. Raises AlignzooError for a folder of none.

    What only might matter, as other versions of libraries, is said and not counted.
    """
    runs = [RunDir(folder) for folder in folders]
    manifests = [run.read_manifest() for run in runs]  # a folder of no run is told before anything else
    found = 0
    for run, manifest in zip(runs, manifests, strict=True):
        recipe, records = load_recipe(run.path / "recipe.toml"), run.read_metrics()
        total = planned_steps(recipe, records)
        last = max((int(record["step"]) for record in records), default=0)
        running = _is_running(run)
        state = "finished" if run.finished else "running" if running else "interrupted"
        say(f"{run.path}: {state}, at step {last} of {total or 'an unknown number'}")
        wrong = [
            *_in_the_folder(run, running),
            *_not_finite(records),
            *_by_the_records(run, recipe, records, total, say),
        ]
        for words in wrong:
            say(f"WARNING: {words}")
        if not wrong:
            say("nothing found")
        here = {"alignzoo": __version__, "python": _python(), "versions": versions()}
        for line in other_versions(manifest, here):
            say(f"note: {line.removeprefix('WARNING: ')}")
        found += len(wrong)
    return found


def planned_steps(recipe: Recipe, records: Sequence[Record]) -> int:
    """Optimizer steps of a run, as its records tell: `epoch` is the share of its steps. 0 where there are none yet."""
    begun = [record for record in records if record.get("epoch")]
    if not begun:
        return 0
    last, train = begun[-1], recipe.train
    steps: int = round(last["step"] / last["epoch"]) * train.epochs
    return steps if train.max_steps is None else min(steps, train.max_steps)


def _is_running(run: RunDir) -> bool:
    try:
        with run.held():
            return False
    except AlignzooError:
        return True


def _in_the_folder(run: RunDir, running: bool) -> Iterator[str]:
    if run.finished or running:
        return
    kept = sorted(run.checkpoints.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    way = f"alignzoo run {run.path / 'recipe.toml'} --resume {run.path}"
    behind = (
        f"goes on after step {kept[-1].name.removeprefix('step-')}" if kept else "has no checkpoint, and starts anew"
    )
    yield f"interrupted: no model was saved at its end. It {behind}: {way}"
    for partial in run.checkpoints.glob(".step-*.partial"):
        yield f"{partial}: a checkpoint that was not written to its end; --resume removes it"
    for stack in sorted((run.path / "stacks").glob("rank-*.txt")):
        yield f"{stack}: nothing moved any more (engine.hang_timeout), and there it stood"


def _not_finite(records: Sequence[Record]) -> Iterator[str]:
    bad = [record for record in records if record.get(NON_FINITE)]
    if bad:
        first = bad[0]
        yield f"step {first['step']}: not finite: {first[NON_FINITE]}" + (
            f", and {len(bad) - 1} more records" * (len(bad) > 1)
        )


def _by_the_records(run: RunDir, recipe: Recipe, records: Sequence[Record], total: int, say: Say) -> Iterator[str]:
    """The rules of the watch over all records, one after the other, as the run had them."""
    if not records:
        return
    loss = _loss(run, recipe, say)
    if loss is None:
        return
    symptoms = Symptoms(known_of(recipe, loss, total))
    for record in records:
        yield from map(str, symptoms.see(record))


def _loss(run: RunDir, recipe: Recipe, say: Say) -> Loss | None:
    """The run's loss; its plugin file lies in the run directory."""
    try:
        return find_loss(recipe, discover(sorted((run.path / "plugins").glob("*.py"))))[1]
    except AlignzooError as error:
        say(f"note: the records are not judged, since the loss is not to be had: {error}")
        return None


def _python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()}"
