"""Our side of benchmarks/step.py: the engine of a run, given a model and token trees."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from step_data import KINDS, Plan
from step_measure import Clock

import alignzoo
from alignzoo import head
from alignzoo.check import Job, Live, find_loss
from alignzoo.engine import Engine
from alignzoo.loading import check_head, choose_layout, load_models
from alignzoo.plugins import discover, loss_table
from alignzoo.precompute import Precompute
from alignzoo.recipe import load_recipe
from alignzoo.reference import plan_reference
from alignzoo.rewards import make_rewards
from alignzoo.sharding import make_accelerator

if TYPE_CHECKING:
    from torch import Tensor

LAYOUTS = {
    "trees": {}, "packed": {"engine.prefix_sharing": "off"}, "padded": {"engine.packing": "off"},
}  # fmt: skip


class PolicyGradient(alignzoo.Loss):
    """GRPO's loss at its first step, where the ratio is 1, in its defaults: for where no "grpo" is installed."""

    name, data, needs_reference = "policy_gradient", "groups", False
    Settings = alignzoo.NoSettings
    prepare_pass = False

    def prepare(self, step: alignzoo.Step, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        assert step.rewards is not None
        assert step.group is not None
        advantages = torch.zeros_like(step.rewards)
        for group in step.group.unique():
            own = step.rewards[step.group == group]
            std = own.std() if len(own) > 1 else own.new_zeros(())
            advantages[step.group == group] = (own - own.mean()) / (std + 1e-4)
        return {"advantages": advantages}, state

    def __call__(self, batch: alignzoo.Groups) -> alignzoo.LossOutput:
        logps = batch.completion.policy  # (N, T)
        ratio = (logps - logps.detach()).exp()
        loss = -ratio * batch.step["advantages"][:, None]
        return alignzoo.LossOutput(loss, per="token", mask=batch.completion.mask)


@dataclass(frozen=True)
class Outcome:
    """Lines of metrics, one for each step; seconds before the first for the reference; what is forwarded at once."""

    lines: list[dict[str, float]]
    fill_seconds: float
    budget: int
    layout: str


def loss_name(loss: str, data: str) -> str:
    """The loss that stands for it here. How cost grows with completions is measured with the stand-in always."""
    installed = {row["name"] for row in loss_table(discover())}
    if loss == "grpo" and (loss not in installed or data.startswith("completions-")):
        return PolicyGradient.name
    return loss


def train(spec: dict[str, Any], model: Any, tokenizer: Any, plan: Plan, clock: Clock) -> Outcome:
    """All steps of a specification of a case."""
    if spec["compile"]:
        for layer in model.model.layers:
            for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
                part.compile()
    with tempfile.TemporaryDirectory() as folder:
        return _train(_recipe(spec, plan, folder), spec, model, tokenizer, plan, clock)


def _recipe(spec: dict[str, Any], plan: Plan, folder: str) -> alignzoo.Recipe:
    table = {
        "loss": {"name": loss_name(spec["loss"], spec["data"])},
        "model": {"path": "given"},
        "data": {"train": "given"},
        "reference": {"mode": "live" if spec["reference"] == "live" else "cache"},
        "train": {
            "learning_rate": spec["learning_rate"], "batch_size": len(plan.steps[0]), "max_steps": len(plan.steps),
            "lr_scheduler": "constant", "warmup_ratio": 0.0, "seed": spec["seed"], "optimizer": "adamw_torch",
        },
        "engine": {"precision": spec["precision"]},
        "output": {"dir": folder},
    }  # fmt: skip
    return load_recipe(table, {**LAYOUTS[spec["layout"]], **spec["set"]})


def _train(
    recipe: alignzoo.Recipe, spec: dict[str, Any], model: Any, tokenizer: Any, plan: Plan, clock: Clock
) -> Outcome:
    console, lines = Console(quiet=True), list[dict[str, float]]()
    registry = discover((), (PolicyGradient,))
    infos, loss = find_loss(recipe, registry)
    assert loss.data == KINDS[spec["loss"]]
    accelerator = make_accelerator(recipe)
    longest = max(len(t.prompt) + len(c.ids) for t in plan.trees for c in t.branches)
    data: Any = SimpleNamespace(
        train=plan.trees, eval=[], shortest=min(plan.trees, key=lambda tree: tree.tokens),
        highest_token=max(int(ids.max()) for t in plan.trees for ids in (t.prompt, *(c.ids for c in t.branches))),
    )  # fmt: skip
    reference = plan_reference(recipe, loss, live_model=True)
    live = Live(model=model, tokenizer=tokenizer)
    job = Job(
        recipe, infos, loss, make_rewards(recipe, registry), registry, reference, None, tokenizer, data,
        len(plan.steps), live,
    )  # fmt: skip
    filling = Precompute(job, accelerator, console)
    policy, frozen = load_models(job, accelerator, lambda _: None)
    engine = Engine(recipe, loss, policy, reference, frozen, accelerator, console=console, sink=lines.append)
    check_head(job, engine)
    choose_layout(recipe, engine, plan.trees[0], longest)
    began = time.perf_counter()
    filling.run(engine)
    fill_seconds = time.perf_counter() - began if reference.kind == "cached" else 0.0
    clock.time_function("head", head._LinearLogProbs)
    if engine.step_reference is not None:
        engine.step_reference.score = clock.timed("reference", engine.step_reference.score)  # type: ignore[method-assign]
    clock.start()
    engine.fit(plan.trees, [], lambda *_: bool(clock.step()))
    return Outcome(lines, fill_seconds, engine.budget, engine.way.name)
