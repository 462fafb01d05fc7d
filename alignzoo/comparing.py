"""`alignzoo compare`: runs made where they are missing, read, compared, and told. It imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from alignzoo.compare import compare
from alignzoo.comparepage import terminal_table, verdict, write
from alignzoo.errors import AlignzooError
from alignzoo.progress import Say
from alignzoo.readrun import read_finished
from alignzoo.sweep import Start, conditions, not_compared, plan, sweep


def compare_runs(
    runs: Sequence[Path], output: Path, baseline: str | None, say: Say, notes: Sequence[str] = (), title: str = ""
) -> Path:
    """Reads finished runs and writes their comparison below `output`; returns the path of the page.

    notes: what is to be read first
    """
    folders = list(dict.fromkeys(path.resolve() for path in runs))
    comparison = compare([read_finished(path) for path in folders], baseline)
    path = write(comparison, output, title or "Comparison of " + ", ".join(g.label for g in comparison.groups), notes)
    for line in (*notes, *comparison.notes):
        say(f"NOTE: {line}")
    Console().print(terminal_table(comparison))
    for line in verdict(comparison):
        say(line)
    say(f"report: {path}")
    return path


def compare_losses(
    recipe: Path,
    losses: Sequence[str],
    output: Path | None,
    baseline: str | None,
    say: Say,
    *,
    seeds: int = 1,
    overrides: Sequence[str] = (),
    of_loss: Sequence[str] = (),
    plugins: Sequence[Path] = (),
    start: Start | None = None,
) -> int:
    """Runs a recipe with each loss and seed, then compares what came to its end. The exit code: 1 where a run failed.

    start: how a run is started, if not in a process of its own
    Raises AlignzooError for mistakes in names and settings before the first run.
    """
    planned = plan(recipe, losses, seeds, output, overrides, of_loss, plugins)
    if len(planned) < 2:
        raise AlignzooError(
            f"--losses {','.join(losses)} with --seeds {seeds}: one run cannot be compared", fix="name two or more"
        )
    if baseline is not None and baseline not in losses:
        raise AlignzooError(f"--baseline {baseline}: not among --losses {','.join(losses)}")
    failures = sweep(planned, say, start)
    failed = {id(failure.planned) for failure in failures}
    done = [one for one in planned if id(one) not in failed]
    for failure in failures:
        say(f"FAILED: {failure.planned.run_dir.path.name}: {failure.reason}")
    if len(done) < 2:
        raise AlignzooError("less than two runs came to their end: nothing to compare", fix="see their errors above")
    folder = planned[0].run_dir.path.parent
    notes = [*not_compared(failures), conditions(planned, of_loss)]
    if baseline is not None and baseline not in {one.loss for one in done}:
        notes.insert(0, f"no run of the baseline {baseline} came to its end: {done[0].loss} takes its place")
        baseline = None
    title = f"{', '.join(dict.fromkeys(one.loss for one in done))} on {recipe.name}"
    compare_runs([one.run_dir.path for one in done], folder, baseline, say, notes, title)
    return 1 if failures else 0
