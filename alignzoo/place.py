"""Where a run writes: a new directory, or that of an interrupted run, with what it goes on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignzoo.check import Job
from alignzoo.checkpoint import CheckpointReader, latest_checkpoint, open_checkpoint, remove_after, remove_left_overs
from alignzoo.data.formats_found import strangers
from alignzoo.data.show import rendered_row
from alignzoo.errors import AlignzooError
from alignzoo.model import from_anywhere, hash_weights
from alignzoo.plugin_kinds import FormatInfo, Info
from alignzoo.progress import Say
from alignzoo.recipe import to_table
from alignzoo.resume import check_inputs, find_run, make_ready, note_resume, recipe_changes, table_of
from alignzoo.rundir import RunDir, manifest, run_name
from alignzoo.sharding import same_everywhere

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Place:
    """The directory of a run, and the checkpoint that it goes on from."""

    run_dir: RunDir
    reader: CheckpointReader | None = None


def start_or_resume(
    job: Job,
    accelerator: Accelerator,
    resume: Path | bool,
    command: Sequence[str],
    started: datetime,
    say: Say,
    held: ExitStack,
) -> Place:
    """The first rank makes the directory, or finds and checks the one to go on with; all ranks get it.

    held: keeps others from writing there for as long as it is open
    """
    found: tuple[Path, Path | None] | None = None
    if accelerator.is_main_process:
        if resume is False:
            found = _start(job, command, started, say, held), None
        else:
            found = _resume(job, resume if isinstance(resume, Path) else None, command, started, say, held)
    path, checkpoint = same_everywhere(accelerator, found)
    return Place(RunDir(path), None if checkpoint is None else open_checkpoint(checkpoint, verify=False))


def _start(job: Job, command: Sequence[str], started: datetime, say: Say, held: ExitStack) -> Path:
    """Recipe, manifest and plugin file, before the weights are loaded."""
    recipe = job.recipe
    name = recipe.log.run_name or run_name(recipe.name, job.loss.name, started)
    run_dir = RunDir.create(Path(recipe.output.dir), name)
    held.enter_context(run_dir.held())
    say(f"run directory: {run_dir.path}")
    say(f"the first row as text: {rendered_row(job.data.train[0], job.tokenizer)}")
    run_dir.write_recipe(table_of_job(job))
    brought = (*job.infos, *job.rewards.infos, *_formats(job), *job.callbacks.infos)
    for origin in dict.fromkeys(info.origin for info in brought if info.distribution == "file"):
        run_dir.copy_plugin(Path(origin))
    run_dir.write_json("manifest.json", _manifest(job, command, started))
    return run_dir.path


def _resume(
    job: Job, what: Path | None, command: Sequence[str], started: datetime, say: Say, held: ExitStack
) -> tuple[Path, Path | None]:
    """The directory of the run, and its newest good checkpoint. Raises AlignzooError where it cannot go on."""
    found = find_run(job.recipe, what, say)
    run_dir, checkpoints = found.run_dir, found.run_dir.path / "checkpoints"
    held.enter_context(run_dir.held())
    say(f"run directory: {run_dir.path}")
    changes = recipe_changes(table_of(run_dir), table_of_job(job))
    for change in changes:
        say(f"changed: {change}")
    check_inputs(run_dir.read_manifest(), _manifest(job, command, started), say)
    remove_left_overs(checkpoints, say)
    reader = open_checkpoint(found.checkpoint) if found.checkpoint else latest_checkpoint(checkpoints, say)
    if reader is None:
        say("no checkpoint was written yet: it starts again from its first step")
    elif reader.step > job.steps:
        raise AlignzooError(
            f"{reader.folder} is of step {reader.step}, and the run has {job.steps} steps",
            fix="raise train.epochs or train.max_steps, or name an earlier checkpoint",
        )
    else:
        remove_after(checkpoints, reader.step, say)
    make_ready(run_dir, reader.json("run")["metrics_bytes"] if reader else 0, say)
    step = reader.step if reader else 0
    note_resume(run_dir, step=step, command=command, table=table_of_job(job), changes=changes)
    return run_dir.path, reader.folder if reader else None


def table_of_job(job: Job) -> dict[str, Any]:
    """The resolved recipe, as the run directory has it."""
    model = dataclasses.replace(job.recipe.model, path=from_anywhere(job.recipe.model.path, job.location))
    return to_table(
        dataclasses.replace(job.recipe, model=model), job.settings, job.rewards.settings, job.callbacks.settings
    )


def _manifest(job: Job, command: Sequence[str], started: datetime) -> dict[str, Any]:
    return manifest(
        command=command,
        seed=job.recipe.train.seed,
        started=started,
        plugins=[_owner(i) for i in (*job.infos, *job.rewards.infos, *_formats(job))],  # callbacks change nothing
        data={f"{s.role}: {s.path}": s.sha256 for s in job.data.report.sources},
        weights={} if job.location is None else hash_weights(job.location),
        recipe_folder=job.recipe.tables.folder,
        live=[name for name, value in vars(job.live).items() if value is not None],
    )


def _formats(job: Job) -> list[FormatInfo]:
    """The formats of plugins that the rows are read with."""
    data = job.recipe.data
    return strangers(
        [s for sources in (data.train, data.eval) if isinstance(sources, tuple) for s in sources], job.registry
    )


def _owner(info: Info) -> dict[str, str]:
    return {info.kind: info.name, "distribution": info.distribution, "version": info.version, "label": info.label}
