"""Optimizer and schedule by their names in transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from alignzoo.recipe import Recipe
from alignzoo.schema import nearest

OWN = ("adamw_torch", "adamw_torch_fused")
_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]  # as transformers' Trainer


def check_names(recipe: Recipe) -> None:
    """Raises RecipeError for an optimizer or a schedule that transformers does not have."""
    train = recipe.train
    for key, value, names in (
        ("optimizer", train.optimizer, [str(o.value) for o in OptimizerNames]),
        ("lr_scheduler", train.lr_scheduler, [str(s.value) for s in SchedulerType]),
    ):
        if value not in names:
            what = f'train.{key} = "{value}" is unknown to transformers{nearest(value, names)}'
            raise recipe.error(("train", key), what, fix="one of " + ", ".join(sorted(names)))


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over all weights that train; decay for matrices only."""
    train = recipe.train
    decay = set(get_parameter_names(model, [nn.LayerNorm], _NO_DECAY))
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if n in decay], "weight_decay": train.weight_decay},
        {"params": [p for n, p in named if n not in decay], "weight_decay": 0.0},
    ]
    try:
        cls, options = class_and_options(recipe, model)
        return cls([g for g in groups if g["params"]], **options)
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        raise recipe.error(
            ("train", "optimizer"), f'train.optimizer = "{train.optimizer}" cannot be made', why=str(error)
        ) from error


def class_and_options(recipe: Recipe, model: nn.Module) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """As transformers' Trainer has them. It is not asked for AdamW: its import takes most of a second."""
    train = recipe.train
    if train.optimizer in OWN:
        options = {"lr": train.learning_rate, "betas": tuple(train.adam_betas), "eps": train.adam_epsilon}
        # in fp16 the fused kernel skips a step by itself, and accelerate, which counts these, does not see it
        fused = train.optimizer.endswith("fused") and recipe.engine.precision != "fp16"
        return torch.optim.AdamW, options | ({"fused": True} if fused else {})
    from transformers import Trainer

    arguments: Any = SimpleNamespace(
        learning_rate=train.learning_rate, adam_beta1=train.adam_betas[0], adam_beta2=train.adam_betas[1],
        adam_epsilon=train.adam_epsilon, optim=OptimizerNames(train.optimizer), optim_args=None,
        optim_target_modules=None,
    )  # fmt: skip
    return Trainer.get_optimizer_cls_and_kwargs(arguments, model)  # type: ignore[no-any-return]


def warmup_steps(recipe: Recipe, total: int) -> int:
    """warmup_steps if given, else the ratio of all steps, rounded up as transformers' Trainer does."""
    given = recipe.train.warmup_steps
    return given if given is not None else -int(-(total * recipe.train.warmup_ratio) // 1)


def make_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, total: int) -> Any:
    """The learning-rate schedule, stepped once per optimizer step."""
    return get_scheduler(recipe.train.lr_scheduler, optimizer, warmup_steps(recipe, total), total)
