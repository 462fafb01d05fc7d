"""A run from recipe to run directory. `run` reads as the flow: recipe, data, model, reference, engine, report."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from rich.console import Console

from alignzoo.api import Loss
from alignzoo.check import Job, Live, each_loss, make_job
from alignzoo.checkpoint import CheckpointReader, prune
from alignzoo.data.template import choose_template
from alignzoo.data.tokenise import prompt_ids
from alignzoo.data.watch import Watch
from alignzoo.engine import Engine, Record
from alignzoo.errors import AlignzooError, RunError
from alignzoo.evalrows import RowScores, write_eval_rows
from alignzoo.loading import check_head, choose_layout, load_models
from alignzoo.logprobs import Scorer
from alignzoo.model import from_anywhere, load_model, locate, save_model
from alignzoo.observer import Observer
from alignzoo.others import hold_others
from alignzoo.place import Place, start_or_resume
from alignzoo.precompute import Precompute
from alignzoo.progress import Say, said, sayer
from alignzoo.recipe import Recipe, load_recipe
from alignzoo.records import Sample
from alignzoo.report import figures_table, finish, samples_table, summary
from alignzoo.rollout import Rollouts, hold_reference
from alignzoo.samples import answer, stop_tokens
from alignzoo.sharding import end_trackers, leave, make_accelerator, of_all_ranks, same_everywhere, zero_in_words
from alignzoo.snapshot import full_state, restore, save_snapshot
from alignzoo.stopping import Interrupted, Signals, Stopping
from alignzoo.tree import Tree
from alignzoo.watchdog import Watchdog

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Result:
    """What a run leaves behind. metrics: the last evaluation and training figures by their names in metrics.jsonl."""

    metrics: dict[str, float]
    run_dir: Path
    model_path: Path
    summary: dict[str, Any]


class Enough(AlignzooError):
    """A run was asked to stop after some steps, and did."""


def run(
    recipe: Recipe | str | Path,
    model: Any = None,
    tokenizer: Any = None,
    train: Any = None,
    eval: Any = None,
    losses: Sequence[type[Loss]] = (),
    *,
    plugins: Sequence[Path] = (),
    console: Console | None = None,
    command: Sequence[str] = (),
    resume: Path | bool = False,
    stop_after: int | None = None,
) -> Result:
    """Runs a recipe. Live objects take the place of what it names; `losses` are classes that need not be installed.

    model, tokenizer: a transformers causal language model, trained in place, and its tokenizer
    train, eval: lists of rows (dictionaries), or a datasets.Dataset
    resume: go on with an interrupted run: its directory, a checkpoint in it, or True for the newest of this recipe
    stop_after: raise Enough after so many steps: the schedule is that of the whole run, and no model is saved
    Raises AlignzooError, with everything that can be checked without the weights checked before they are loaded.
    """
    started = datetime.now().astimezone()
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    accelerator = make_accelerator(recipe)
    first = accelerator.is_main_process
    console = (console or Console()) if first else Console(quiet=True)
    say = sayer(console)
    said(console).clear()  # of the recipe before, in a chain
    if not console.is_terminal:
        transformers.utils.logging.disable_progress_bar()
    given, watch = Live(model, tokenizer, train, eval), Watch(say, console)
    job = make_job(recipe, say, live=given, plugin_files=plugins, losses=losses, watch=watch)
    with ExitStack() as held:
        place = start_or_resume(job, accelerator, resume, command, started, say, held)
        if first:
            held.enter_context(_told(job, place, say))
        training = make_ready(job, accelerator, place, console, held, stop_after)
        result = training.run()
        accelerator.wait_for_everyone()
    training.engine.holder.close()
    return result


@contextmanager
def _told(job: Job, place: Place, say: Say) -> Iterator[None]:
    """Tells the callbacks of a run that it begins and how it ends."""
    callbacks, began, folder = job.callbacks, time.monotonic(), str(place.run_dir.path)
    callbacks.begin(say)
    callbacks.call("run_started", {
        "directory": folder, "recipe": job.recipe.name, "loss": job.loss.name, "steps": job.steps,
        "rows": len(job.data.train), "held_out": len(job.data.eval), "resumed": place.reader is not None,
    })  # fmt: skip
    end = {"status": "finished", "error": "", "directory": folder, "model": f"{folder}/model"}
    try:
        yield
    except BaseException as error:
        status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        end |= {"status": status, "error": str(error) or type(error).__name__, "model": ""}
        raise
    finally:
        callbacks.end({**end, "seconds": time.monotonic() - began})


def make_ready(
    job: Job, accelerator: Accelerator, place: Place, console: Console, held: ExitStack, stop_after: int | None = None
) -> Training:
    """All that comes before the first step: models, engine, and the reference's log-probs."""
    recipe, say = job.recipe, sayer(console)
    dog = held.enter_context(Watchdog(recipe.engine.hang_timeout, accelerator.process_index, place.run_dir.path))
    reference = Precompute(job, accelerator, console)
    policy, frozen = load_models(job, accelerator, say)
    observer = Observer(job, place.run_dir, accelerator, say, resumed=place.reader is not None)
    engine = _engine(job, policy, frozen, accelerator, place, console, observer)
    engine.beat = dog.beat
    reference.run(engine, place.reader.step if place.reader is not None else 0)
    return Training(job, engine, place, console, dog, observer, reference.used, stop_after)


def run_chain(
    recipes: Sequence[Path],
    overrides: Sequence[str],
    plugins: Sequence[Path],
    command: Sequence[str],
    resume: Path | bool = False,
) -> list[Result]:
    """`alignzoo run A B ...`: each recipe after the first starts from the model that the one before trained."""
    loaded = [
        load_recipe(path, overrides) for path in recipes
    ]  # a mistake in the last one is told before the first runs
    if resume and len(recipes) > 1:
        raise AlignzooError(
            "--resume goes on with one run, and several recipes are given",
            fix='resume the one that was interrupted, then run the others with model.path = "run:DIR"',
        )
    console = Console(quiet=int(os.environ.get("RANK", "0")) > 0)
    results: list[Result] = []
    for number, recipe in enumerate(loaded):
        if results:
            start = f"run:{results[-1].run_dir}"
            sayer(console)(f"\nrecipe {number + 1} of {len(loaded)}: {recipes[number]}, model.path = {start}")
            recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, path=start, revision=None))
        results.append(run(recipe, plugins=plugins, console=console, command=command, resume=resume))
    leave()
    return results


def _engine(
    job: Job, policy: Scorer, frozen: Scorer | None, accelerator: Accelerator, place: Place, console: Console,
    observer: Observer,
) -> Engine:  # fmt: skip
    recipe, say = job.recipe, sayer(console)
    accelerator.project_configuration.set_directories(str(place.run_dir.path))
    if recipe.log.trackers:
        accelerator.init_trackers("alignzoo", config={"loss": job.loss.name, "recipe": recipe.name})
    for line in zero_in_words(recipe, accelerator):
        say(line)

    def sink(line: Record) -> None:
        observer.see(line)
        job.callbacks.see(line)

    def keep(step: int, trees: Sequence[Tree], scores: RowScores) -> None:
        if accelerator.is_main_process:
            write_eval_rows(place.run_dir.path, step, trees, scores)

    engine = Engine(recipe, job.loss, policy, job.reference, frozen, accelerator, console=console, sink=sink)
    engine.on_rows = keep
    check_head(job, engine)
    say(choose_layout(recipe, engine, job.data.train[0], recipe.data.max_length))
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    source = "engine.tokens_per_device" if recipe.engine.tokens_per_device else f"the default for {engine.device.type}"
    ranks = f"{engine.ranks} processes, ZeRO stage {recipe.engine.zero}, " if engine.ranks > 1 else ""
    say(f"engine: {ranks}{engine.device}, {precision}, micro-batches of at most {engine.budget} positions ({source})")
    if recipe.rollout is not None:
        engine.online = _rollouts(job, engine, place, console)
    large = job.data.rows_over(engine.budget, packed=engine.way.packed, shared=engine.way.shared)
    if large:
        say(f"{large} rows have more positions than that: each runs alone, in more memory")
    if job.loss.has_prepare and job.loss.prepare_pass:
        say(f"{job.loss.name} looks at each whole step first: one more forward pass without gradients per step")
    return engine


def _rollouts(job: Job, engine: Engine, place: Place, console: Console) -> Rollouts:
    """What answers the prompts during the run."""
    recipe, model = job.recipe, engine.bare.model
    job.rewards.start(engine.device)
    stops = stop_tokens(model, job.tokenizer, choose_template(recipe.data, job.tokenizer).does.end)
    held = hold_others(job, engine.device, hold_reference(engine, job.reference), sayer(console))
    return Rollouts(recipe, engine, job.rewards, job.tokenizer, stops, place.run_dir.path, held, console=console)


class Training:
    """The part of a run that has an engine: answers before and after, training with checkpoints, report.

    Its methods are called on all ranks; only the first one writes.
    """

    def __init__(
        self, job: Job, engine: Engine, place: Place, console: Console, dog: Watchdog, observer: Observer,
        cached: Mapping[str, Any], stop_after: int | None = None,
    ) -> None:  # fmt: skip
        """cached: what came out of the reference's cache, for the report."""
        self.cached, self.stop_after = cached, stop_after
        self.job, self.engine, self.place, self.console, self.dog = job, engine, place, console, dog
        self.observer = observer
        self.recipe, self.say, self.first = job.recipe, sayer(console), engine.rank == 0
        self.run_dir, self.checkpoints = place.run_dir, place.run_dir.path / "checkpoints"
        self.stopping = Stopping(self.recipe)
        self.signals = Signals(self.say)
        self.before: list[str] = []

    def run(self) -> Result:
        began, start = time.monotonic(), 0
        asked, prompts = sample_prompts(self.job, self.say)
        if self.place.reader is not None:
            start = self._restore(self.place.reader)
        elif prompts:
            self.before = self.answers(prompts, "answering before training")
        fit_began, data = time.monotonic(), self.job.data
        with self.signals:
            self.engine.fit(data.train, data.eval, self._on_step, self.job.pairs, start, self._on_start)
            self.signals.words = "the training is done, and the model is being saved; once more: at once, without it"
            seconds = time.monotonic() - fit_began
            after = self.answers(prompts, "answering after training") if prompts else []
            model_path = self._save("model")
            result = None
            if self.first:
                samples = [Sample(*row) for row in zip(asked, self.before, after, strict=True)]
                result = self._report(samples, model_path, seconds, time.monotonic() - began)
        end_trackers(self.engine.accelerator)
        found: Result = same_everywhere(self.engine.accelerator, result)
        return found

    def _restore(self, reader: CheckpointReader) -> int:
        self.say(f"going on after step {reader.step} of {self.job.steps}: {reader.folder}")
        kept = restore(self.engine, reader, self.job.steps, self.say)
        self.before = list(kept["answers_before"])
        if self.engine.online is not None:
            self.engine.online.load_state(kept["rollouts"])
        self.stopping = Stopping(self.recipe, kept["best"])
        return reader.step

    # --- between two steps

    def _on_start(self, found: Record) -> bool:
        """Checks the names of metrics in the first evaluation, and tells whether the run ends before its first step."""
        self.stopping.check(found)
        self._stop_by_callback(0)
        return self._ends(0, self.observer.reason())

    def _stop_by_callback(self, step: int) -> None:
        """Raises RunError on all ranks where a callback with `strict` failed; the first rank alone calls them."""
        callbacks = self.job.callbacks
        fault = same_everywhere(self.engine.accelerator, callbacks.fault) if callbacks.strict else ""
        if fault:
            raise RunError(
                f"stopped after step {step}: {fault}", fix="mend what it depends on, or leave out its strict",
                on_all_ranks=True,
            )  # fmt: skip

    def _ends(self, step: int, reason: str) -> bool:
        if reason:
            self.say(f"stopped after step {step}: {reason}")
        return bool(reason)

    def _on_step(self, step: int, found: Record) -> bool:
        """Keeps the best model, writes a checkpoint where one is due, and tells whether the run ends here."""
        if step == self.stop_after:
            raise Enough(f"stopped after step {step}", on_all_ranks=True)
        self._stop_by_callback(step)
        if self.stopping.look(found):
            self._keep_best(step)
        if self._ends(step, self.stopping.reason(found) or self.observer.reason()):
            return True
        asked = max(of_all_ranks(self.engine.accelerator, self.signals.asked))
        every = self.recipe.checkpoint.every_steps
        due = bool(every) and step % (every or 1) == 0 and step < self.job.steps
        if due or asked:
            self._checkpoint(step)
        if asked:
            raise Interrupted(
                asked,
                f"stopped after step {step} of {self.job.steps} by {Signals.name(asked)}; {self.run_dir.path} has all",
                fix=f"go on: alignzoo run {self.recipe.tables.file or 'RECIPE'} --resume {self.run_dir.path}",
            )
        return False

    def _checkpoint(self, step: int) -> None:
        self.dog.beat(f"writing the checkpoint of step {step}")
        size = self.run_dir.sync_metrics() if self.first else 0
        extra = {"metrics_bytes": size, "answers_before": self.before, "best": self.stopping.state}
        if self.engine.online is not None:
            extra["rollouts"] = self.engine.online.state(step, self.engine.window)
        folder = save_snapshot(self.engine, self.checkpoints, step, extra, self.dog.beat)
        self.say(f"saved {folder}")
        self.job.callbacks.call("checkpoint_saved", str(folder))
        if self.first:
            prune(self.checkpoints, self.recipe.checkpoint.keep, self.say, written=folder)

    def _keep_best(self, step: int) -> None:
        best = self.stopping.best
        self.say(f"the best {self.recipe.eval.best_metric} so far: {best.value:.6g} at step {step}, kept in best/")
        old = self.run_dir.path / "best"
        self._save("best-new")
        if self.first:
            if old.is_dir():
                shutil.rmtree(old)
            (self.run_dir.path / "best-new").rename(old)

    # --- answers, model, report

    def answers(self, prompts: Sequence[Sequence[int]], title: str) -> list[str]:
        """The first rank answers; under ZeRO-3 the weights are gathered for it, or all ranks answer together."""
        engine, gather = self.engine, self.recipe.samples.gather
        sharded = engine.holder.sharded and not gather
        self.dog.beat(title)
        with engine.holder.gathered() if gather else nullcontext():
            return self._answers_here(prompts, title, sharded) if self.first or sharded else []

    def _answers_here(self, prompts: Sequence[Sequence[int]], title: str, sharded: bool) -> list[str]:
        engine = self.engine

        def generate(**options: Any) -> Any:
            self.dog.beat()
            synced = {"synced_gpus": True} if engine.ranks > 1 else {}
            return engine.inside(lambda model: model.generate(**options, **synced))

        end = choose_template(self.recipe.data, self.job.tokenizer).does.end
        settings, seed = self.recipe.samples, self.recipe.train.seed
        return answer(
            engine.bare.model, self.job.tokenizer, prompts, settings, seed, self.console, title, end,
            generate if sharded else None, self.dog.beat,
        )  # fmt: skip

    def _save(self, name: str) -> Path:
        """The model, or its adapter, as a folder of the run; output.merge gives the merged model."""
        self.dog.beat(f"saving {name}")
        folder, model = self.run_dir.path / name, self.engine.bare.model
        state = full_state(self.engine, self.dog.beat)
        if not self.first:
            return folder
        recipe, base, tokenizer = (
            self.recipe,
            from_anywhere(self.recipe.model.path, self.job.location),
            self.job.tokenizer,
        )
        if not recipe.output.merge or name != "model":
            return save_model(model, tokenizer, folder, base=base, merge=False, state=state)
        if state is None and not recipe.model.quantization:
            return save_model(model, tokenizer, folder, base=base, merge=True)
        self.say("merging the adapter into its base, loaded again whole and not quantised")
        adapter = save_model(model, tokenizer, folder.with_name("adapter"), base=base, merge=False, state=state)
        whole = dataclasses.replace(recipe.model, quantization=None, lora=None)
        return save_model(load_model(locate(str(adapter)), whole, self.say), tokenizer, folder, base=base, merge=False)

    def _report(self, samples: Sequence[Sample], model_path: Path, seconds: float, whole: float) -> Result:
        job, run_dir = self.job, self.run_dir
        records = run_dir.read_metrics()
        papers = [one.paper for one in each_loss(job.loss) if one.paper]
        figures = summary(
            records, eval_rows=len(job.data.eval), eval_pairs=len(job.pairs), train_rows=len(job.data.train),
            model_path=model_path, seconds=seconds, recipe=self.recipe.name, loss=job.loss.name,
            paper="; ".join(papers), reference=job.reference.words, reference_cache=self.cached,
            warnings=run_dir.read_warnings(),
        )  # fmt: skip
        title = self.recipe.name if self.recipe.name == job.loss.name else f"{self.recipe.name} ({job.loss.name})"
        plot = finish(run_dir, records, samples, figures, title, said(self.console))
        if samples:
            self.console.print(samples_table(samples))
        self.console.print(figures_table(figures))
        self.say(f"model: {model_path}\nplot:  {plot}\nreport: {run_dir.path / 'report.html'}")
        self.say(f"all in {run_dir.path}, {whole:.0f} s after loading")
        metrics = {k: v for r in records[-2:] for k, v in r.items() if isinstance(v, int | float)}
        return Result(metrics, run_dir.path, model_path, figures)


def sample_prompts(job: Job, say: Say) -> tuple[list[str], list[list[int]]]:
    """samples.prompts and samples.from_eval held-out ones, evenly spread: as a person reads them, and as token ids."""
    settings, held_out = job.recipe.samples, job.data.eval
    if job.recipe.model.head == "scalar":
        if settings.prompts or settings.from_eval:
            say('no sample answers: model.head = "scalar" gives scores, and answers nothing')
        return [], []
    template = choose_template(job.recipe.data, job.tokenizer)
    asked = list(settings.prompts)
    ids = [prompt_ids(text, template, job.tokenizer, settings.system) for text in asked]
    count = min(settings.from_eval, len(held_out))
    for i in (n * len(held_out) // count for n in range(count)):
        asked.append(job.data.asked[i])
        ids.append(held_out[i].prompt.tolist())
    return asked, ids
