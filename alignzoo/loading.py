"""The models of a run: policy and frozen reference loaded, given an adapter, and compared with what the data needs."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import Tensor

from alignzoo import attention
from alignzoo.attention import CannotPack
from alignzoo.batch import PADDED, Layout, Way, padded_layout
from alignzoo.check import Job
from alignzoo.engine import Engine
from alignzoo.errors import ModelError
from alignzoo.logprobs import Scorer, check_scorer, is_mixture_of_experts, is_scalar, positions_of, values_of
from alignzoo.model import Location, add_adapter, load_model, locate, set_dropout, set_pad_token
from alignzoo.progress import Say
from alignzoo.recipe import Model, Recipe
from alignzoo.sharding import full_shape, sharded_loading
from alignzoo.tree import Completion, Tree

if TYPE_CHECKING:
    from accelerate import Accelerator


def load_models(job: Job, accelerator: Accelerator, say: Say) -> tuple[Scorer, Scorer | None]:
    """The policy, and the frozen reference where there is one."""
    recipe = job.recipe
    transformers.set_seed(recipe.train.seed)
    model = job.live.model
    if model is None:
        say(f"loading {recipe.model.path} ({recipe.model.dtype})")
        assert job.location is not None
        model = _load(job, job.location, recipe.model, accelerator, say)
    _check_head(job, model)
    changed = set_dropout(model, recipe.model.dropout)
    if changed:
        say(f"dropout: set to {recipe.model.dropout} in {changed} places of the model")
    frozen = load_reference(job, model, accelerator, say) if job.reference.kind == "frozen" else None
    if recipe.model.lora is not None:
        model = add_adapter(model, recipe.model.lora, recipe.model.quantization is not None)
        trained, whole = model.get_nb_trainable_parameters()
        say(f"adapter: {trained:,} of {whole:,} weights train")
    if recipe.engine.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    scorer = Scorer(model, router_loss=recipe.model.router_loss > 0)
    _check_sizes(job, scorer, say)
    return scorer, frozen


def _check_head(job: Job, model: Any) -> None:
    """A model given from Python has the head that the recipe names. A scalar one is told the pad token."""
    scalar = job.recipe.model.head == "scalar"
    if scalar != is_scalar(model) or (scalar and model.config.num_labels != 1):
        wanted = "AutoModelForSequenceClassification with num_labels = 1" if scalar else "AutoModelForCausalLM"
        raise job.recipe.error(
            ("model", "head"), f'model.head = "{job.recipe.model.head}", and the model is a {type(model).__name__}',
            fix=f"give a model of {wanted}",
        )  # fmt: skip
    if scalar:
        set_pad_token(model, job.tokenizer)


def _load(job: Job, where: Location, settings: Model, accelerator: Accelerator, say: Say, trained: bool = True) -> Any:
    """A model; under ZeRO-3 each rank holds its share from the start, where its files allow that."""
    seed = job.recipe.train.seed
    if job.recipe.engine.zero < 3:
        return load_model(where, settings, say, seed=seed)
    whole = "a GGUF file" if where.gguf else "an adapter over its base" if where.base else None
    if whole:
        say(f"engine.zero = 3: {whole} is loaded whole on every rank, and shared out afterwards")
        return load_model(where, settings, say, seed=seed)
    say(f"engine.zero = 3: each rank holds 1/{accelerator.num_processes} of the weights from the start")
    shared = partial(sharded_loading, job.recipe, accelerator, trained)
    return load_model(where, settings, say, seed=seed, around=shared)


def load_reference(job: Job, start: Any, accelerator: Accelerator, say: Say) -> Scorer:
    """The reference model: loaded from reference.path, or a copy of the start model before it trains."""
    path, settings = job.recipe.reference.path, dataclasses.replace(job.recipe.model, lora=None)
    if path is None and (job.recipe.engine.zero < 3 or job.location is None):
        return Scorer(copy.deepcopy(start))
    if path is None:
        assert job.location is not None  # weights that are shared out cannot be copied: loaded again
        say(f"loading the reference {job.recipe.model.path}")
        reference = _load(job, job.location, settings, accelerator, say, trained=False)
        set_dropout(reference, 0.0)
        return Scorer(reference)
    say(f"loading the reference {path}")
    reference = _load(job, locate(path, job.recipe.reference.revision), settings, accelerator, say, trained=False)
    ours, theirs = start.config.get_text_config().vocab_size, reference.config.get_text_config().vocab_size
    if ours != theirs:
        raise ModelError(
            f"reference.path = {path} has a vocabulary of {theirs} tokens, the policy one of {ours}",
            why="their log-probs cannot be compared",
            fix="use a reference of the same family",
        )
    set_dropout(reference, 0.0)
    return Scorer(reference)


def _check_sizes(job: Job, scorer: Scorer, say: Say) -> None:
    """The model fits the tokenizer and the settings."""
    rows, highest = full_shape(scorer.causal_lm.get_input_embeddings().weight)[0], job.data.highest_token
    if highest >= rows:
        raise ModelError(
            f"the data holds token {highest}, and the model has {rows} embeddings", fix="use the model's own tokenizer"
        )
    _check_positions(job, scorer)
    mixture = is_mixture_of_experts(scorer.causal_lm)
    if mixture and job.recipe.model.router_loss == 0:
        say("router loss: off (model.router_loss = 0)")
    if not mixture and job.recipe.model.router_loss > 0:
        raise job.recipe.error(
            ("model", "router_loss"), "model.router_loss: the model has no experts", fix="set it to 0"
        )


def _check_positions(job: Job, scorer: Scorer) -> None:
    """No row is longer than the model's table of positions, with what is sampled after it."""
    table, rollout = positions_of(scorer.causal_lm), job.recipe.rollout
    if table is None:
        return
    room = 0 if rollout is None else rollout.max_new_tokens
    lengths = job.data.lengths + room
    over = int((lengths > table).sum())
    if over:
        sampled = f" with rollout.max_new_tokens = {room}" if room else ""
        raise ModelError(
            f"{over} rows have more than {table} tokens{sampled}, the longest {lengths.max()}",
            why=f"the model has a table of {table} positions",
            fix=f"set data.max_length = {table}: then data.truncation drops or cuts them, and counts",
        )


def check_head(job: Job, engine: Engine) -> None:
    """The model's head is read rightly: one short forward pass of every rank."""
    shortest = job.data.shortest
    rows = [shortest] if shortest.completions else trial_trees(shortest)
    check_scorer(engine.bare, padded_layout(rows), engine.inside)


# --- the layout of rows ----------------------------------------------------------------------------------------------

WORDS = {
    Way(packed=True, shared=True): "token trees (prompts shared, no padding)",
    Way(packed=True): "packed rows (no padding)",
}


def choose_layout(recipe: Recipe, engine: Engine, tree: Tree, longest: int) -> str:
    """Packs rows and shares prompts where the models can, and says so in a line.

    tree: a row of the data to try it on; longest: tokens of the longest sequence
    Raises ModelError where the recipe insists and a model cannot.
    """
    settings = recipe.engine
    if settings.packing == "off":
        return "layout: padded: engine.packing = off"
    router = recipe.model.router_loss > 0  # counts tokens, also those of a prompt that comes again
    if router and settings.prefix_sharing == "on":
        raise recipe.error(
            ("engine", "prefix_sharing"), 'engine.prefix_sharing = "on", and model.router_loss is set',
            why="the router loss counts the prompt once for each completion", fix='use "auto" or "off"',
        )  # fmt: skip
    way = Way(packed=True, shared=settings.prefix_sharing != "off" and not router)
    reason = _why_padded(recipe, engine, way, tree, longest)
    if not reason:
        engine.way = way
        note = ": the router loss counts every prompt" if router and settings.prefix_sharing == "auto" else ""
        return f"layout: {WORDS[way]}{note}"
    insisted = [key for key in ("packing", "prefix_sharing") if getattr(settings, key) == "on"]
    if insisted:
        raise recipe.error(
            ("engine", insisted[0]), f'engine.{insisted[0]} = "on", and the model cannot: {reason}',
            fix='use "auto", which pads such a model\'s rows',
        )  # fmt: skip
    return f"layout: padded: {reason}"


def _why_padded(recipe: Recipe, engine: Engine, way: Way, tree: Tree, longest: int) -> str:
    """Why the policy or its reference cannot compute rows in this way; where both can, they are made to."""
    scorers: list[tuple[Scorer, Callable[[Layout], Any]]] = [(engine.bare, engine.policy)]
    if engine.frozen is not None and engine.frozen_forward is not None:
        scorers.append((engine.frozen, engine.frozen_forward))
    reason = ""
    for scorer, forward in scorers:
        reason = reason or make_packed(recipe, engine, scorer, forward, way, tree, longest)
    if reason:
        for scorer, _ in scorers:
            make_padded(scorer)
    return reason


def make_packed(
    recipe: Recipe, engine: Engine, scorer: Scorer, forward: Callable[[Layout], Any], way: Way, tree: Tree, longest: int
) -> str:
    """Makes a model compute rows in this way, and tries it; why it cannot, in words, where it cannot."""
    lm = scorer.causal_lm
    reason = attention.why_not(lm)
    if reason:
        return reason
    attention.enable(lm)
    windows = attention.sliding_windows(lm)
    scorer.flex = not windows and recipe.model.dropout == 0
    narrow = windows if windows and min(windows) < longest else []
    exact = engine.accelerator.mixed_precision == "no" and lm.dtype in (torch.float32, torch.float64)
    return _try(scorer, forward, way, tree, narrow, exact)


def make_padded(scorer: Scorer) -> None:
    """Takes back what `make_packed` changed."""
    if not attention.why_not(scorer.causal_lm):
        attention.enable(scorer.causal_lm, on=False)


@torch.no_grad()
def _try(
    scorer: Scorer, forward: Callable[[Layout], Any], way: Way, tree: Tree, windows: list[int], exact: bool
) -> str:
    """Why not, found by computing the same trees in both layouts. windows: of the layers whose window rows exceed.

    exact: in float32 or better, so that more than rounding is a mistake
    """
    trees, was_training = trial_trees(tree), scorer.training
    scorer.eval()
    try:
        rows = PADDED.layout(trees)
        padded = values_of(forward(rows), rows)
        with attention.windows_seen() as seen:
            packed = _packed(scorer, forward, way.layout(trees))
    except CannotPack as error:
        return str(error)
    finally:
        scorer.train(was_training)
    apart = (padded.double() - packed.double()).abs()
    worst, tolerance = (apart.max().item(), 1e-3) if exact else (apart.mean().item(), 0.1)
    if windows and sorted(w for w in seen if w is not None) != sorted(windows):
        return "its layers do not tell their sliding window"
    if worst <= tolerance:
        return ""
    what, unit = ("scores", "") if is_scalar(scorer.causal_lm) else ("log-probs", " nats a token")
    return f"its {what} would differ by {worst:.2g}{unit}"


def _packed(scorer: Scorer, forward: Callable[[Layout], Any], layout: Layout) -> Tensor:
    """The values of a packed row; without flex_attention where this machine cannot compile it."""
    try:
        return values_of(forward(layout), layout)
    except CannotPack:
        raise
    except Exception as error:
        if not scorer.flex or scorer.device.type != "cuda":
            raise
        warnings.warn(f"flex_attention failed, attention is computed node by node: {error}", stacklevel=2)
        scorer.flex = False
        return values_of(forward(layout), layout)


def trial_trees(tree: Tree) -> list[Tree]:
    """Two trees of two completions each, unlike each other, of up to 64 tokens of a row."""
    ids = np.concatenate([tree.prompt, *(c.ids for c in tree.completions[:1])])
    ids = np.resize(ids, max(len(ids), 12))[:64]
    prompt, rest = np.split(ids, [len(ids) // 2])
    both = (Completion(rest), Completion(rest[::-1][1:]))
    return [Tree(-1, prompt, both), Tree(-2, prompt[::-1][1:], both[::-1])]
