"""One recipe with several losses and seeds, one run after the other, each in a process of its own.

All runs have the recipe's data, order, model and settings, and share the cache of the reference's log-probs. A process
of its own gives each run its own peak of memory, and an end that the others do not feel. It imports no torch.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignzoo.check import each_loss, find_loss
from alignzoo.errors import AlignzooError, RecipeError
from alignzoo.launch import run_forwarding
from alignzoo.plugins import Registry, discover
from alignzoo.progress import Say
from alignzoo.recipe import Recipe, load_recipe, to_table
from alignzoo.resume import Change, differences, table_of
from alignzoo.rewards import make_rewards
from alignzoo.rundir import RunDir

Start = Callable[[Sequence[str]], tuple[int, str]]  # the words behind `alignzoo` -> exit code, and its error
_STOPPED = (130, 143)  # exit codes of a run that a signal ended: SIGINT, SIGTERM
_FREE = ("log", "output", "checkpoint", "engine.hang_timeout")  # what may change between two calls


@dataclass(frozen=True)
class Planned:
    """One run that a comparison wants."""

    loss: str
    seed: int
    recipe: Recipe
    words: tuple[str, ...]  # behind `alignzoo`, for a new run
    run_dir: RunDir
    state: str  # "new", "finished", or "open" where it was interrupted


@dataclass(frozen=True)
class Failure:
    planned: Planned
    reason: str


def plan(
    recipe: Path,
    losses: Sequence[str],
    seeds: int,
    output: Path | None = None,
    overrides: Sequence[str] = (),
    of_loss: Sequence[str] = (),
    plugins: Sequence[Path] = (),
) -> list[Planned]:
    """What is to be run, and what is there already. seeds: train.seed of the recipe, and the numbers after it.

    of_loss: overrides for one loss, "ipo:train.learning_rate=2e-5"
    Raises AlignzooError for every mistake in names and settings, before the first run starts.
    """
    registry = discover(plugins)
    own = load_recipe(recipe, overrides)
    wanted = list(dict.fromkeys(losses))
    by_loss = _by_loss(of_loss, wanted)
    folder = output or Path(own.output.dir) / f"compare-{own.name}"
    found = []
    for loss in wanted:
        for seed in range(own.train.seed, own.train.seed + seeds):
            name = f"{loss}-seed{seed}"
            sets = [
                *([] if [loss] == [choice.name for choice in own.losses] else [f'loss={{name = "{loss}"}}']),
                *overrides,
                *by_loss[loss],
            ]
            sets += [f"train.seed={seed}", f"output.dir={folder}", f"log.run_name={name}"]
            made = load_recipe(recipe, sets)
            table = _table(made, registry)
            words = ["run", str(recipe), *(w for s in sets for w in ("--set", s))]
            words += [w for plugin in plugins for w in ("--plugin", str(plugin))]
            run_dir = RunDir(folder / name)
            found.append(Planned(loss, seed, made, tuple(words), run_dir, _state(run_dir, table)))
    return found


def sweep(planned: Sequence[Planned], say: Say, start: Start | None = None) -> list[Failure]:
    """Runs what is not finished, and goes on after a run that fails. Raises AlignzooError where a signal ends one."""
    failures = []
    for number, one in enumerate(planned, start=1):
        title = f"run {number} of {len(planned)}: {one.loss}, seed {one.seed}, {one.run_dir.path}"
        if one.state == "finished":
            say(f"{title}: finished before with the same recipe")
            continue
        say(f"\n{title}{', which was interrupted' if one.state == 'open' else ''}")
        resume = ["--resume", str(one.run_dir.path)] if one.state == "open" else []
        code, error = (start or start_process)([*one.words, *resume])
        if code in _STOPPED:
            raise _Stopped(code, f"stopped in {title}", fix="the same command again goes on there")
        if code:
            failures.append(Failure(one, error or f"exit code {code}"))
            say(f"{title}: FAILED, the others go on")
    return failures


class _Stopped(AlignzooError):
    def __init__(self, code: int, what: str, *, fix: str) -> None:
        super().__init__(what, fix=fix)
        self.exit_code = code


def start_process(words: Sequence[str]) -> tuple[int, str]:
    """`alignzoo WORDS` in a process of its own: its exit code, and what it says of its error."""
    with tempfile.TemporaryFile() as errors:
        code = run_forwarding([sys.executable, "-m", "alignzoo", *words], errors)
        errors.seek(0)
        text = errors.read().decode("utf-8", "replace")
    sys.stderr.write(text)
    return code, _error_in(text) if code else ""


def _error_in(text: str) -> str:
    """The error as the command line tells it, or the last line of a traceback."""
    told = text.rfind("error: ")
    lines = [line for line in text.splitlines() if line.strip()]
    if told >= 0 and (told == 0 or text[told - 1] == "\n"):
        return text[told:].removeprefix("error: ").strip()
    return lines[-1] if lines else ""


def _by_loss(of_loss: Sequence[str], losses: Sequence[str]) -> Mapping[str, list[str]]:
    """The overrides of each loss. Raises RecipeError for what is not LOSS:KEY=VALUE of a loss that is compared."""
    found: dict[str, list[str]] = {loss: [] for loss in losses}
    for text in of_loss:
        loss, colon, override = text.partition(":")
        if not (colon and "=" in override):
            raise RecipeError(
                f"--loss-set {text}: not of the form LOSS:KEY=VALUE", fix="e.g. ipo:train.learning_rate=2e-5"
            )
        if loss not in found:
            raise RecipeError(f'--loss-set {text}: "{loss}" is not compared', why=f"--losses {','.join(losses)}")
        found[loss].append(override)
    return found


def _table(recipe: Recipe, registry: Registry) -> dict[str, object]:
    _, loss = find_loss(recipe, registry)
    rewards = make_rewards(recipe, registry, lambda _: None)
    return to_table(recipe, [dataclasses.asdict(one.settings) for one in each_loss(loss)], rewards.settings)


def _state(run_dir: RunDir, now: Mapping[str, object]) -> str:
    """What is there of a run. Raises AlignzooError where it was made with other settings."""
    if not run_dir.path.exists():
        return "new"
    if not (run_dir.path / "recipe.toml").exists() or not (run_dir.path / "manifest.json").exists():
        raise AlignzooError(
            f"{run_dir.path}: no run directory, and a run is to be made there",
            fix="remove it, or give another --output",
        )
    changes = [change for change in differences(table_of(run_dir), now) if not _may_change(change)]
    if changes:
        raise AlignzooError(
            f"{run_dir.path} was made with other settings: {'; '.join(map(str, changes))}",
            fix="give another --output, or remove that folder",
        )
    return "finished" if run_dir.finished else "open"


def _may_change(change: Change) -> bool:
    if change.key == "model.path":  # a run has it as an absolute path
        (before, old), (now, new) = (str(path).rpartition(":")[::2] for path in (change.before, change.now))
        return before == now and Path(old).expanduser().resolve() == Path(new).expanduser().resolve()
    return any(change.key == key or change.key.startswith(f"{key}.") for key in _FREE)


def not_compared(failures: Sequence[Failure]) -> list[str]:
    """Notes for the report."""
    return [f"{f.planned.run_dir.path.name} failed and is not compared: {f.reason}" for f in failures]


def conditions(planned: Sequence[Planned], of_loss: Sequence[str]) -> str:
    """What the report says of the settings of the losses."""
    apart = f", but for {', '.join(of_loss)}" if of_loss else ""
    return (
        f"all losses have the values of {planned[0].recipe.tables.file}, the learning rate too; the recipe's own loss "
        f"has its settings there, the others have the defaults of theirs{apart}: a loss may do better at another rate"
    )
