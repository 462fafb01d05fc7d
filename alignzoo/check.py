"""What can be known of a run without loading its weights: `alignzoo check`, and the first half of a run."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from alignzoo.adapt import as_tables, check_moving, moving_settings, split
from alignzoo.api import Loss
from alignzoo.batch import count_steps
from alignzoo.callbacks import Callbacks, make_callbacks
from alignzoo.data.dataset import Prepared, held_out, prepare
from alignzoo.data.formats_found import check_formats
from alignzoo.data.show import marked_example
from alignzoo.data.template import choose_template
from alignzoo.data.tokenise import ensure_pad_token
from alignzoo.data.watch import Watch
from alignzoo.errors import ModelError, PluginError
from alignzoo.mixture import Mixture, what_of
from alignzoo.plugin_kinds import LossInfo
from alignzoo.plugins import Registry, discover, make_loss
from alignzoo.progress import Say, sayer
from alignzoo.recipe import Data, Recipe, problems_error
from alignzoo.rewards import Rewards, make_rewards
from alignzoo.schema import Problem, show
from alignzoo.tree import Tree

if TYPE_CHECKING:
    from alignzoo.model import Location
    from alignzoo.reference import ReferencePlan


@dataclass(frozen=True)
class Live:
    """Objects given from Python in the place of what a recipe names."""

    model: Any = None
    tokenizer: Any = None
    train: Any = None
    eval: Any = None


@dataclass(frozen=True)
class Job:
    """A run that is ready to load its weights."""

    recipe: Recipe
    infos: tuple[LossInfo, ...]  # of each [loss]
    loss: Loss
    rewards: Rewards
    registry: Registry
    reference: ReferencePlan
    location: Any  # model.Location, or None for a model given from Python
    tokenizer: Any
    data: Prepared
    steps: int
    live: Live
    others: tuple[Any, ...] = ()  # model.Location of each of rollout.others; None of an address
    pairs: Sequence[Tree] = ()  # the held-out pairs, where the loss eats them in another form
    callbacks: Callbacks = field(default_factory=lambda: Callbacks(()))

    @property
    def settings(self) -> list[dict[str, Any]]:
        """Of each [loss], as a recipe has them: of one that moves, how it does."""
        own = [dataclasses.asdict(loss.settings) for loss in each_loss(self.loss)]
        return [own[0] | as_tables(moving_settings(self.recipe, self.loss)), *own[1:]]


def make_job(
    recipe: Recipe,
    say: Say,
    *,
    live: Live | None = None,
    plugin_files: Sequence[Path] = (),
    losses: Sequence[type[Loss]] = (),
    watch: Watch | None = None,
) -> Job:
    """Recipe, plugin, names and data, in the order of what is cheap to find wrong. Raises AlignzooError."""
    live = _in_memory(live or Live())
    registry = discover(plugin_files, losses)
    for warning in registry.warnings:
        say(f"WARNING: {warning}")
    infos, loss = find_loss(recipe, registry)
    rewards = make_rewards(recipe, registry, say)
    callbacks = make_callbacks(recipe, registry)
    check_formats(recipe, registry)
    _tell_plugins(recipe, infos, loss, rewards, callbacks, say)
    from alignzoo.reference import plan_reference  # torch: a misspelt loss is told before it is imported

    _check_loss_fits(recipe, loss)
    kind = _kind_of_rows(recipe, loss, rewards)
    reference = plan_reference(recipe, loss, live_model=live.model is not None)
    say(f"reference: {reference.words}")
    _check_names(recipe)
    location, tokenizer = _find_model(recipe, live, reference.kind, say)
    say(ensure_pad_token(tokenizer))
    _check_vllm(recipe, location)
    others = _find_others(recipe, tokenizer, location, reference.kind)
    data = prepare(
        room_for_completions(recipe),
        kind,
        tokenizer,
        needs_mismatched=loss.needs_mismatched and kind != "prompts",
        train=live.train,
        eval=live.eval,
        seed=recipe.train.seed,
        say=say,
        watch=watch,
        registry=registry,
    )
    if kind == "prompts":
        rewards.check_columns(list(data.train[0].columns))
    train = recipe.train
    iterations = recipe.rollout.iterations if recipe.rollout else 1
    steps = count_steps(len(data.train), train.batch_size, train.epochs, train.max_steps, iterations)
    _carry_template(recipe, tokenizer, say)
    pairs = _held_out_pairs(recipe, kind, tokenizer, data, live, say, registry)
    say(describe_steps(recipe, data, steps))
    _warn(recipe, loss, tokenizer, say)
    return Job(
        recipe, infos, loss, rewards, registry, reference, location, tokenizer, data, steps, live, others, pairs,
        callbacks,
    )  # fmt: skip


def _tell_plugins(
    recipe: Recipe, infos: Sequence[LossInfo], loss: Loss, rewards: Rewards, callbacks: Callbacks, say: Say
) -> None:
    """What the recipe has chosen, with its settings."""
    for info, one, choice in zip(infos, each_loss(loss), recipe.losses, strict=True):
        say(f"loss: {describe_loss(info, one)}" + (f", weight {choice.weight:g}" if len(infos) > 1 else ""))
    for name, how in moving_settings(recipe, loss).items():
        say(f"loss.{name} moves: {how}")
    for line in rewards.describe():
        say(f"reward: {line}")
    for line in callbacks.describe():
        say(f"callback: {line}")
    if len(rewards) and recipe.rollout is None:
        say("WARNING: [[rewards]] is without effect: without [rollout] nothing is sampled")


def _find_model(recipe: Recipe, live: Live, reference: str, say: Say) -> tuple[Location | None, Any]:
    """Where the model is, and its tokenizer. The weights are loaded later, those of a reference too."""
    from alignzoo.model import load_tokenizer, locate

    location = None if live.model is not None else locate(recipe.model.path, recipe.model.revision)
    if location is None and live.tokenizer is None:
        raise ModelError("run(model=...) needs its tokenizer too", fix="pass tokenizer=")
    if recipe.reference.path is not None and reference in ("frozen", "cached"):
        locate(recipe.reference.path, recipe.reference.revision)
    tokenizer = live.tokenizer
    if tokenizer is None and location is not None:
        say(f"loading the tokenizer of {recipe.model.path}")
        tokenizer = load_tokenizer(location, trust_remote_code=recipe.model.trust_remote_code)
    if location is not None:
        _check_saved_head(recipe, location)
    return location, tokenizer


def _check_loss_fits(recipe: Recipe, loss: Loss) -> None:
    """The loss has the head and the columns that it learns from."""
    scalar, names = recipe.model.head == "scalar", ", ".join(f'"{one.name}"' for one in each_loss(loss))
    if scalar != loss.needs_scores:
        right = "scalar" if loss.needs_scores else "lm"
        has = "gives a score for each completion and no log-probs" if scalar else "gives log-probs and no scores"
        raise recipe.error(
            ("model", "head"), f'model.head = "{recipe.model.head}", and loss {names} learns from {what_of(loss)}',
            why=f"such a head {has}", fix=f'set model.head = "{right}", or take another loss',
        )  # fmt: skip
    cannot = {
        ("rollout",): (recipe.rollout is not None, "a scalar head answers no prompts"),
        ("model", "router_loss"): (
            recipe.model.router_loss > 0,
            "transformers' sequence classifiers have no such loss",
        ),
    }
    for key, (asked, why) in cannot.items():
        if scalar and asked:
            raise recipe.error(key, f'{".".join(key)} is set, and model.head = "scalar"', why=why, fix="take it out")
    missing = [column for column in loss.columns if column not in recipe.data.keep]
    if missing:
        raise recipe.error(
            ("data", "keep"), f'loss {names} reads the column "{missing[0]}", and data.keep does not have it',
            fix=f"data.keep = {[*recipe.data.keep, *missing]}",
        )  # fmt: skip


def _check_saved_head(recipe: Recipe, location: Location) -> None:
    """What the model's files hold has a head that the recipe can use."""
    from alignzoo.model import in_words, labels_of

    labels, head = labels_of(location), recipe.model.head
    if labels and (head == "lm" or labels != 1):
        raise recipe.error(
            ("model", "path"),
            f'model.path = {recipe.model.path} holds {in_words(labels)}, and model.head = "{head}"',
            fix="name a language model" if head == "lm" else "name a language model, or a reward model",
        )  # fmt: skip


def _in_memory(live: Live) -> Live:
    """Rows that can be gone through only once as a list, since they may be wanted as two kinds of data."""
    listed = {name: list(rows) for name in ("train", "eval") if isinstance(rows := getattr(live, name), Iterator)}
    return dataclasses.replace(live, **listed)


def _carry_template(recipe: Recipe, tokenizer: Any, say: Say) -> None:
    """A template that the recipe names is saved with the model, so that who loads it writes prompts as in training."""
    template = choose_template(recipe.data, tokenizer)
    if template.text is not None and template.text != tokenizer.chat_template:
        tokenizer.chat_template = template.text
        say("the saved tokenizer carries this template")


def _kind_of_rows(recipe: Recipe, loss: Loss, rewards: Rewards) -> str:
    """What the rows of the files are made into: what the loss eats, or prompts that are answered during the run."""
    if recipe.rollout is not None:
        if not len(rewards) and not recipe.rollout.directed:
            raise recipe.error(
                ("rollout",), "[rollout] samples completions, and nothing says which of them are good",
                fix="add at least one [[rewards]]; `alignzoo rewards` lists what there is",
            )  # fmt: skip
        if loss.data == "groups" and recipe.rollout.others:
            raise recipe.error(
                ("rollout", "others"),
                f'loss "{recipe.losses[0].name}" weights completions by how likely the policy was to draw them',
                why="those of rollout.others were drawn by somebody else: their old log-probs are not the policy's",
                fix="take a loss on pairs, labelled rows or demonstrations",
            )
        return "prompts"
    return loss.data


def _check_vllm(recipe: Recipe, location: Any) -> None:
    """vLLM is there where the recipe wants it, and can load the model by itself."""
    if recipe.rollout is None or recipe.rollout.sampler != "vllm":
        return
    place = ("rollout", "sampler")
    if importlib.util.find_spec("vllm") is None:
        raise recipe.error(place, 'rollout.sampler = "vllm": it is not installed', fix="pip install 'alignzoo[vllm]'")
    while location is not None and location.base is not None:
        location = location.base
    if location is None or location.gguf is not None:
        what = "a model given from Python" if location is None else f"a GGUF file, {location.gguf}"
        raise recipe.error(
            place, f'rollout.sampler = "vllm" and {what}', why="vLLM loads a folder or a hub id by itself, once",
            fix="save the model with save_pretrained, and name the folder",
        )  # fmt: skip


def _find_others(recipe: Recipe, tokenizer: Any, location: Any, reference: str) -> tuple[Any, ...]:
    """Where the models of rollout.others are; their tokenizers are the policy's. Raises RecipeError, ModelError."""
    from alignzoo.model import load_tokenizer, locate

    found: list[Any] = []
    for i, other in enumerate(recipe.rollout.others if recipe.rollout is not None else ()):
        place, path, where = ("rollout", "others", i), other.source, location
        if other.remote:
            if other.api_key_env and not os.environ.get(other.api_key_env):
                what = f"the environment variable {other.api_key_env} is not set"
                raise recipe.error((*place, "api_key_env"), what, fix=f"export {other.api_key_env}=...")
            found.append(None)
            continue
        if path == "reference":
            path = recipe.reference.path or ""
            if not path and location is None and reference == "none":
                why = "the model is given from Python, and the loss keeps no reference of it"
                raise recipe.error((*place, "source"), "there is no reference", why=why, fix="name reference.path")
        if path:
            try:
                where = locate(path, recipe.reference.revision if other.source == "reference" else None)
            except ModelError as error:
                words = error.what.removeprefix("model.path: ")
                raise recipe.error((*place, "source"), words, why=error.why, fix=error.fix) from error
            theirs = load_tokenizer(where, trust_remote_code=recipe.model.trust_remote_code)
            if theirs.get_vocab() != tokenizer.get_vocab():
                raise recipe.error(
                    (*place, "source"), f"{path} has another vocabulary than the policy",
                    why="its tokens mean something else", fix="serve it, and name its address: text has no tokens",
                )  # fmt: skip
        if other.role == "revision" and not choose_template(recipe.data, tokenizer).chat:
            why = "the policy's completion is shown as a turn of a conversation"
            raise recipe.error((*place, "role"), "a revision needs a chat template", why=why, fix="an address has one")
        found.append(where)
    return tuple(found)


def room_for_completions(recipe: Recipe) -> Data:
    """The data settings, with a limit for prompts that leaves room for what is sampled."""
    data, rollout = recipe.data, recipe.rollout
    if rollout is None:
        return data
    room = data.max_length - rollout.max_new_tokens
    return dataclasses.replace(data, max_prompt_length=min(room, data.max_prompt_length or room))


def _held_out_pairs(
    recipe: Recipe, kind: str, tokenizer: Any, data: Prepared, live: Live, say: Say, registry: Registry
) -> Sequence[Tree]:
    """The held-out rows as pairs, where they are pairs and the loss wants another kind: accuracy for every loss."""
    sources = [s for s in data.report.sources if s.role == "eval"] or data.report.sources
    if not data.eval or kind == "pairs" or any(s.kind != "pairs" for s in sources):
        return ()
    given = {"train": live.train, "eval": live.eval, "registry": registry}
    pairs = held_out(data, recipe.data, "pairs", tokenizer, say=say, **given)
    if pairs:
        say(f"{len(pairs)} held-out pairs are measured as pairs too (eval_pairs/accuracies)")
    return pairs


def find_loss(recipe: Recipe, registry: Registry) -> tuple[tuple[LossInfo, ...], Loss]:
    """The recipe's losses with their settings, several as one Mixture.

    Raises PluginError where one is not found, RecipeError for its settings and for losses that do not go together.
    """
    problems: list[Problem] = []
    infos = tuple(registry.get(choice.name) for choice in recipe.losses)
    made = []
    for info, choice in zip(infos, recipe.losses, strict=True):
        settings, moving = split(choice.settings, info.cls.Settings, choice.path, problems)
        made.append(make_loss(info, settings, problems, choice.path))
        if len(infos) > 1:
            problems += [Problem((*choice.path, name), f"{name} moves: that is for one loss alone") for name in moving]
        elif made[0] is not None:
            problems += check_moving(made[0], moving, choice.path)
    losses = [loss for loss in made if loss is not None]
    if problems or len(losses) < len(made):
        raise problems_error(recipe.tables, problems)
    if len(losses) == 1:
        return infos, losses[0]
    try:
        return infos, Mixture(losses, [choice.weight for choice in recipe.losses])
    except PluginError as error:
        raise recipe.error(("loss",), error.what, why=error.why, fix=error.fix) from error


def each_loss(loss: Loss) -> list[Loss]:
    """The losses of a mixture, or the one there is."""
    return [part.loss for part in loss.parts] if isinstance(loss, Mixture) else [loss]


def describe_loss(info: LossInfo, loss: Loss) -> str:
    """ "dpo (alignzoo 0.1.0) on pairs: beta = 0.1, label_smoothing = 0.0" """
    settings = ", ".join(f"{k} = {show(v)}" for k, v in dataclasses.asdict(loss.settings).items())
    return f"{info.name} ({info.distribution} {info.version}) on {loss.data}: {settings or 'no settings'}"


def describe_steps(recipe: Recipe, data: Prepared, steps: int) -> str:
    train = recipe.train
    length = f"at most {train.max_steps} steps" if train.max_steps else f"{train.epochs} epoch(s)"
    rollout, examples = recipe.rollout, "examples"
    if rollout is not None:
        examples = f"prompts with {rollout.completions} completions each"
        for other in rollout.others:
            examples += f" and {other.completions} of {other.model or other.source} ({other.role})"
        length += f", each batch {rollout.iterations} times" if rollout.iterations > 1 else ""
    return (
        f"steps: {steps} of {train.batch_size} {examples} ({length}) over {len(data.train)} training rows; "
        f"{len(data.eval)} held out"
    )


def _check_names(recipe: Recipe) -> None:
    """Optimizer, schedule, device and trackers, before anything is loaded."""
    from alignzoo.optim import check_names
    from alignzoo.sharding import check_machine

    check_names(recipe)
    check_machine(recipe)


def _warn(recipe: Recipe, loss: Loss, tokenizer: Any, say: Say) -> None:
    """What can be run and is probably not meant."""
    if loss.data != "demonstrations" and not getattr(tokenizer, "chat_template", None):
        say(
            "WARNING: a preference loss on a model without a chat template, probably a base model: "
            "fine-tune it with sft first, or set data.chat_template"
        )
    if recipe.engine.precision == "fp16" and recipe.train.optimizer == "adamw_torch_fused":
        say("optimizer: AdamW is not fused in fp16, where steps that the fused kernel skips would not be counted")
    if recipe.model.dropout > 0 or (recipe.model.lora is not None and recipe.model.lora.dropout > 0):
        say("dropout: on in training, as the recipe asks")
    else:
        say("dropout: off (model.dropout = 0)")


def check(recipe: Recipe, console: Console, plugin_files: Sequence[Path] = ()) -> Job:
    """`alignzoo check`: the job in words, and the first example with prompt, completion and mask marked."""
    say = sayer(console)
    job = make_job(recipe, say, plugin_files=plugin_files, watch=Watch(say, console))
    console.print(marked_example(job.data.train[0], job.tokenizer))
    console.print("check passed: nothing was loaded but the tokenizer", highlight=False)
    return job
