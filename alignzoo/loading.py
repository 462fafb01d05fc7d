"""The models of a run: policy and frozen reference loaded, given an adapter, and compared with what the data needs."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import transformers

from alignzoo.batch import padded_layout
from alignzoo.check import Job
from alignzoo.engine import Engine
from alignzoo.errors import ModelError
from alignzoo.logprobs import Scorer, check_scorer, is_mixture_of_experts
from alignzoo.model import Location, add_adapter, load_model, locate, set_dropout
from alignzoo.progress import Say
from alignzoo.recipe import Model
from alignzoo.sharding import full_shape, sharded_loading

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
    changed = set_dropout(model, recipe.model.dropout)
    if changed:
        say(f"dropout: set to {recipe.model.dropout} in {changed} places of the model")
    frozen = _load_frozen(job, model, accelerator, say) if job.reference.kind == "frozen" else None
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


def _load(job: Job, where: Location, settings: Model, accelerator: Accelerator, say: Say, trained: bool = True) -> Any:
    """A model; under ZeRO-3 each rank holds its share from the start, where its files allow that."""
    if job.recipe.engine.zero < 3:
        return load_model(where, settings, say)
    whole = "a GGUF file" if where.gguf else "an adapter over its base" if where.base else None
    if whole:
        say(f"engine.zero = 3: {whole} is loaded whole on every rank, and shared out afterwards")
        return load_model(where, settings, say)
    say(f"engine.zero = 3: each rank holds 1/{accelerator.num_processes} of the weights from the start")
    with sharded_loading(job.recipe, accelerator, trained):
        return load_model(where, settings, say)


def _load_frozen(job: Job, start: Any, accelerator: Accelerator, say: Say) -> Scorer:
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
    mixture = is_mixture_of_experts(scorer.causal_lm)
    if mixture and job.recipe.model.router_loss == 0:
        say("router loss: off (model.router_loss = 0)")
    if not mixture and job.recipe.model.router_loss > 0:
        raise job.recipe.error(
            ("model", "router_loss"), "model.router_loss: the model has no experts", fix="set it to 0"
        )


def check_head(job: Job, engine: Engine) -> None:
    """The model's head is read rightly: one short forward pass of every rank."""
    check_scorer(engine.bare, padded_layout([job.data.shortest]), engine.inside)
