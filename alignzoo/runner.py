"""A run from recipe to run directory. `run` reads as the flow: recipe, data, model, reference, engine, report."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from alignzoo.api import Loss
from alignzoo.batch import padded_layout
from alignzoo.check import Job, Live, make_job
from alignzoo.data.show import rendered_row
from alignzoo.data.template import choose_template
from alignzoo.data.tokenise import prompt_ids
from alignzoo.data.watch import Watch
from alignzoo.engine import Engine, Record, make_accelerator
from alignzoo.errors import AlignzooError, ModelError
from alignzoo.logprobs import Scorer, check_scorer, is_mixture_of_experts
from alignzoo.model import add_adapter, hash_weights, load_model, locate, save_model, set_dropout
from alignzoo.progress import Say, sayer
from alignzoo.recipe import Recipe, load_recipe, to_table
from alignzoo.report import Sample, figures_table, finish, samples_table, summary
from alignzoo.rundir import RunDir, manifest, run_name
from alignzoo.samples import answer


@dataclass(frozen=True)
class Result:
    """What a run leaves behind. metrics: the last evaluation and training figures by their names in metrics.jsonl."""

    metrics: dict[str, float]
    run_dir: Path
    model_path: Path
    summary: dict[str, Any]


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
) -> Result:
    """Runs a recipe. Live objects take the place of what it names; `losses` are classes that need not be installed.

    model, tokenizer: a transformers causal language model, trained in place, and its tokenizer
    train, eval: lists of rows (dictionaries), or a datasets.Dataset
    Raises AlignzooError, with everything that can be checked without the weights checked before they are loaded.
    """
    started, console = datetime.now().astimezone(), console or Console()
    say = sayer(console)
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    _refuse_many_processes()
    if not console.is_terminal:
        transformers.utils.logging.disable_progress_bar()
    given, watch = Live(model, tokenizer, train, eval), Watch(say, console)
    job = make_job(recipe, say, live=given, plugin_files=plugins, losses=losses, watch=watch)
    name = recipe.log.run_name or run_name(recipe.name, job.info.name, started)
    run_dir = RunDir.create(Path(recipe.output.dir), name)
    say(f"run directory: {run_dir.path}")
    say(f"the first row as text: {rendered_row(job.data.train[0], job.tokenizer)}")
    _write_start(job, run_dir, command, started)
    policy, frozen = _load(job, say)
    engine = _engine(job, policy, frozen, run_dir, console)
    return _train_and_report(job, engine, run_dir, console)


def run_chain(
    recipes: Sequence[Path], overrides: Sequence[str], plugins: Sequence[Path], command: Sequence[str]
) -> list[Result]:
    """`alignzoo run A B ...`: each recipe after the first starts from the model that the one before trained."""
    console = Console()
    results: list[Result] = []
    loaded = [
        load_recipe(path, overrides) for path in recipes
    ]  # a mistake in the last one is told before the first runs
    for number, recipe in enumerate(loaded):
        if results:
            start = f"run:{results[-1].run_dir}"
            sayer(console)(f"\nrecipe {number + 1} of {len(loaded)}: {recipes[number]}, model.path = {start}")
            recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, path=start, revision=None))
        results.append(run(recipe, plugins=plugins, console=console, command=command))
    return results


def _refuse_many_processes() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise AlignzooError(
            f"{os.environ['WORLD_SIZE']} processes: this version trains in one",
            fix="start it without a launcher: alignzoo run RECIPE",
        )


def _write_start(job: Job, run_dir: RunDir, command: Sequence[str], started: datetime) -> None:
    """Recipe, manifest and plugin file, before the weights are loaded."""
    run_dir.write_recipe(to_table(job.recipe, [job.settings]))
    owner: Mapping[str, Any] = {
        "loss": job.info.name,
        "distribution": job.info.distribution,
        "version": job.info.version,
        "label": job.info.label,
    }
    if job.info.distribution == "file":
        run_dir.copy_plugin(Path(job.info.origin))
    run_dir.write_json(
        "manifest.json",
        manifest(
            command=command,
            seed=job.recipe.train.seed,
            started=started,
            plugins=[owner],
            data={f"{s.role}: {s.path}": s.sha256 for s in job.data.report.sources},
            weights={} if job.location is None else hash_weights(job.location),
            recipe_folder=job.recipe.tables.folder,
        ),
    )


def _load(job: Job, say: Say) -> tuple[Scorer, Scorer | None]:
    """The policy, and the frozen reference where there is one."""
    recipe = job.recipe
    transformers.set_seed(recipe.train.seed)
    model = job.live.model
    if model is None:
        say(f"loading {recipe.model.path} ({recipe.model.dtype})")
        model = load_model(job.location, recipe.model, say)
    changed = set_dropout(model, recipe.model.dropout)
    if changed:
        say(f"dropout: set to {recipe.model.dropout} in {changed} places of the model")
    frozen = _load_frozen(job, model, say) if job.reference.kind == "frozen" else None
    if recipe.model.lora is not None:
        model = add_adapter(model, recipe.model.lora, recipe.model.quantization is not None)
        trained, whole = model.get_nb_trainable_parameters()
        say(f"adapter: {trained:,} of {whole:,} weights train")
    if recipe.engine.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    scorer = Scorer(model, router_loss=recipe.model.router_loss > 0)
    _check_model(job, scorer, say)
    return scorer, frozen


def _load_frozen(job: Job, start: Any, say: Say) -> Scorer:
    """The reference model: loaded from reference.path, or copied from the start model before it trains."""
    import copy

    path = job.recipe.reference.path
    if path is None:
        return Scorer(copy.deepcopy(start))
    say(f"loading the reference {path}")
    where = locate(path, job.recipe.reference.revision)
    reference = load_model(where, dataclasses.replace(job.recipe.model, lora=None), say)
    ours, theirs = start.config.get_text_config().vocab_size, reference.config.get_text_config().vocab_size
    if ours != theirs:
        raise ModelError(
            f"reference.path = {path} has a vocabulary of {theirs} tokens, the policy one of {ours}",
            why="their log-probs cannot be compared",
            fix="use a reference of the same family",
        )
    set_dropout(reference, 0.0)
    return Scorer(reference)


def _check_model(job: Job, scorer: Scorer, say: Say) -> None:
    """The model fits the tokenizer, and its head is read rightly: one short forward pass."""
    rows, highest = scorer.causal_lm.get_input_embeddings().weight.shape[0], job.data.highest_token
    if highest >= rows:
        raise ModelError(
            f"the data holds token {highest}, and the model has {rows} embeddings", fix="use the model's own tokenizer"
        )
    mixture = is_mixture_of_experts(scorer.causal_lm)
    if mixture and job.recipe.model.router_loss == 0:
        say("router loss: off (model.router_loss = 0)")
    if not mixture and job.recipe.model.router_loss > 0:
        raise job.recipe.error(
            ("model", "router_loss"), "model.router_loss: the model has no experts", fix="set it to 0"
        )
    check_scorer(scorer, padded_layout([job.data.shortest]))


def _engine(job: Job, policy: Scorer, frozen: Scorer | None, run_dir: RunDir, console: Console) -> Engine:
    recipe, say = job.recipe, sayer(console)
    accelerator = make_accelerator(recipe, str(run_dir.path))
    if recipe.log.trackers:
        accelerator.init_trackers("alignzoo", config={"loss": job.info.name, "recipe": recipe.name})

    def sink(line: Record) -> None:
        run_dir.append_metrics(line)

    engine = Engine(recipe, job.loss, policy, job.reference, frozen, accelerator, console=console, sink=sink)
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    source = "engine.tokens_per_device" if recipe.engine.tokens_per_device else f"the default for {engine.device.type}"
    say(f"engine: {engine.device}, {precision}, micro-batches of at most {engine.budget} positions ({source})")
    large = job.data.rows_over(engine.budget)
    if large:
        say(f"{large} rows have more positions than that: each runs alone, in more memory")
    if job.loss.has_prepare and job.loss.prepare_pass:
        say(f"{job.info.name} looks at each whole step first: one more forward pass without gradients per step")
    return engine


def _train_and_report(job: Job, engine: Engine, run_dir: RunDir, console: Console) -> Result:
    recipe, say, began = job.recipe, sayer(console), time.monotonic()
    asked, prompts = sample_prompts(job)
    model = engine.bare.model

    end = choose_template(recipe.data, job.tokenizer).does.end

    def answers(title: str) -> list[str]:
        return answer(model, job.tokenizer, prompts, recipe.samples, recipe.train.seed, console, title, end)

    before = answers("answering before training") if prompts else []
    fit_began = time.monotonic()
    engine.fit(job.data.train, job.data.eval, _checkpointer(job, engine, run_dir, say), job.pairs)
    seconds = time.monotonic() - fit_began
    after = answers("answering after training") if prompts else []
    model_path = _save(job, model, run_dir.path / "model", say)
    samples = [Sample(*row) for row in zip(asked, before, after, strict=True)]
    records = run_dir.read_metrics()
    figures = summary(
        records, eval_rows=len(job.data.eval), eval_pairs=len(job.pairs), train_rows=len(job.data.train),
        model_path=model_path, seconds=seconds, recipe=recipe.name, loss=job.info.name,
    )  # fmt: skip
    title = recipe.name if recipe.name == job.info.name else f"{recipe.name} ({job.info.name})"
    plot = finish(run_dir, records, samples, figures, title=title)
    engine.accelerator.end_training()
    if samples:
        console.print(samples_table(samples))
    console.print(figures_table(figures))
    say(f"model: {model_path}\nplot:  {plot}\nall in {run_dir.path}, {time.monotonic() - began:.0f} s after loading")
    metrics = {k: v for r in records[-2:] for k, v in r.items() if isinstance(v, int | float)}
    return Result(metrics, run_dir.path, model_path, figures)


def sample_prompts(job: Job) -> tuple[list[str], list[list[int]]]:
    """samples.prompts and samples.from_eval held-out ones, evenly spread: as a person reads them, and as token ids."""
    settings, held_out = job.recipe.samples, job.data.eval
    template = choose_template(job.recipe.data, job.tokenizer)
    asked = list(settings.prompts)
    ids = [prompt_ids(text, template, job.tokenizer, settings.system) for text in asked]
    count = min(settings.from_eval, len(held_out))
    for i in (n * len(held_out) // count for n in range(count)):
        asked.append(job.data.asked[i])
        ids.append(held_out[i].prompt.tolist())
    return asked, ids


def _save(job: Job, model: Any, folder: Path, say: Say) -> Path:
    """The trained model, or its adapter; output.merge gives the merged model."""
    recipe, base = job.recipe, _base(job)
    if not (recipe.output.merge and recipe.model.quantization):
        return save_model(model, job.tokenizer, folder, base=base, merge=recipe.output.merge)
    say("merging the adapter into its base as it was before quantisation")
    adapter = save_model(model, job.tokenizer, folder.with_name("adapter"), base=base, merge=False)
    whole = dataclasses.replace(recipe.model, quantization=None, lora=None)
    return save_model(load_model(locate(str(adapter)), whole, say), job.tokenizer, folder, base=base, merge=False)


def _base(job: Job) -> str:
    """model.path as it can be read from any working directory."""
    path = job.recipe.model.path
    if job.location is None or path.startswith("package:") or job.location.is_hub:
        return path
    scheme, _, rest = path.rpartition(":")
    absolute = str(Path(rest).expanduser().resolve())
    return f"{scheme}:{absolute}" if scheme else absolute


def _checkpointer(job: Job, engine: Engine, run_dir: RunDir, say: Say) -> Callable[[int], None]:
    """Saves the model every checkpoint.every_steps steps and keeps the last few."""
    every, keep = job.recipe.checkpoint.every_steps, job.recipe.checkpoint.keep
    kept: list[Path] = []

    def on_step(step: int) -> None:
        if not every or step % every or step == job.steps:
            return
        folder = run_dir.path / "checkpoints" / f"step-{step}"
        folder.parent.mkdir(exist_ok=True)
        kept.append(save_model(engine.bare.model, job.tokenizer, folder, base=_base(job), merge=False))
        say(f"saved {folder}")
        while len(kept) > keep:
            old = kept.pop(0)
            shutil.rmtree(old)
            say(f"removed {old} (checkpoint.keep = {keep})")

    return on_step
