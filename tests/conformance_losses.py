"""Losses to try the conformance kit on: wrong ones with the check meant for each, right ones that are hard to judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import alignzoo
from alignzoo import LossOutput, NoSettings, setting

Call = Callable[[Any, Any], LossOutput]


@dataclass(frozen=True)
class Beta:
    beta: float = setting(0.1, "strength of the pull towards the reference", gt=0)


@dataclass(frozen=True)
class Unbounded:
    tau: float = setting(0.1, "the target margin is 1/(2 tau)")


@dataclass(frozen=True)
class Smoothing:
    beta: float = setting(0.1, "strength of the pull towards the reference", gt=0)
    smoothing: float = setting(0.0, "probability that a label is wrong", ge=0, lt=0.5)


def loss_class(name: str, call: Call, data: str = "pairs", needs: Any = True, Settings: Any = Beta, **more: Any) -> Any:
    body = {"name": name, "data": data, "needs_reference": needs, "Settings": Settings, "__call__": call, **more}
    return type(name.title().replace("-", ""), (alignzoo.Loss,), body)


def margin(batch: alignzoo.Pairs) -> Tensor:
    return batch.chosen.log_ratio() - batch.rejected.log_ratio()  # (B,)


def dpo(self: Any, batch: Any) -> LossOutput:
    return LossOutput(-logsigmoid(self.settings.beta * margin(batch)))


def surprise(side: alignzoo.LogProbs) -> Tensor:
    return -side.policy.masked_fill(~side.mask, 0.0)  # (N, T)


# --- wrong -----------------------------------------------------------------------------------------------------------


def in_place(self: Any, batch: Any) -> LossOutput:
    with torch.no_grad():
        batch.chosen.policy[~batch.chosen.mask] = 0.0
    return dpo(self, batch)


def rolled(self: Any, batch: Any) -> LossOutput:
    against = batch.rejected.log_ratio().roll(1, 0)
    return LossOutput(-logsigmoid(self.settings.beta * (batch.chosen.log_ratio() - against)))


def remembers(self: Any, batch: Any) -> LossOutput:
    self.mean = 0.9 * getattr(self, "mean", 0.0) + 0.1 * margin(batch).mean().item()
    return LossOutput(-logsigmoid(self.settings.beta * (margin(batch) - self.mean)))


def by_values(self: Any, batch: Any) -> LossOutput:
    sides = (batch.chosen, batch.rejected)
    chosen, rejected = (-surprise(s).sum(-1) / (s.policy != 0).sum(-1).clamp(min=1) for s in sides)
    return LossOutput(-logsigmoid(self.settings.beta * (chosen - rejected)))


def swapped_rewards(self: Any, batch: Any) -> LossOutput:
    sides = (batch.rejected, batch.chosen)
    return LossOutput(dpo(self, batch).loss, rewards=tuple(s.log_ratio().detach() for s in sides))


def with_metric(name: str, values: Callable[[Any], Any]) -> Call:
    return lambda self, batch: LossOutput(dpo(self, batch).loss, metrics={name: values(batch)})


def moved_mask(self: Any, batch: Any) -> LossOutput:
    return LossOutput(dpo(self, batch).loss, mask=margin(batch).detach() < 0)


def every_token(self: Any, batch: Any) -> LossOutput:
    side = batch.completion
    return LossOutput(surprise(side), per="token", mask=torch.ones_like(side.mask))


def odds(self: Any, batch: Any) -> LossOutput:
    chosen, rejected = (s.mean() - torch.log(1 - torch.exp(s.mean())) for s in (batch.chosen, batch.rejected))
    return LossOutput(-logsigmoid(self.settings.beta * (chosen - rejected)))


def ratio_of_labels(self: Any, batch: Any) -> LossOutput:
    """Divides by the number of the batch's undesirable rows."""
    sign = torch.where(batch.label, 1.0, -1.0)
    return LossOutput(-logsigmoid(self.settings.beta * sign * batch.completion.log_ratio()) / (~batch.label).sum())


def group_deviation(self: Any, step: Any, state: Any) -> Any:
    """Advantages divided by a deviation that is 0 for equal rewards."""
    groups = [step.rewards[step.group == g] for g in step.group.unique()]
    return {"advantage": torch.cat([(r - r.mean()) / r.std(correction=0) for r in groups])}, state


def reinforce(self: Any, batch: Any) -> LossOutput:
    advantage = batch.step["advantage"][:, None]  # (N, 1)
    return LossOutput(advantage * surprise(batch.completion), per="token", mask=batch.completion.mask)


def custom_gradient(self: Any, batch: Any) -> LossOutput:
    return LossOutput(-logsigmoid(self.settings.beta * margin(batch).float().double().pow(3).pow(1 / 3)))


class _Wrong(torch.autograd.Function):
    """Twice the gradient that it should have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad


def shuffled(self: Any, batch: Any) -> LossOutput:
    return LossOutput(dpo(self, batch).loss * (1 + 0.1 * torch.rand(len(batch.chosen.mask))))


def row_weights(self: Any, batch: Any) -> LossOutput:
    return LossOutput(batch.extra["weight"] * dpo(self, batch).loss)


@dataclass(frozen=True)
class Weighted:
    beta: float = setting(0.1, "scale of the log-ratios", gt=0)
    by: str | None = setting(None, "column of data.keep with the weights of the rows")


def weighted_by(self: Any, batch: Any) -> LossOutput:
    weight = 1.0 if self.settings.by is None else batch.extra[self.settings.by]
    return LossOutput(weight * dpo(self, batch).loss)


def declared_the_wrong_way(self: Any) -> tuple[str, ...]:
    return () if self.settings.by else ("weight",)


WRONG: dict[str, tuple[str, Any]] = {
    "sign flipped": ("direction", loss_class("flipped", lambda s, b: -1.0 * dpo(s, b))),
    "rewards of the other side": ("direction", loss_class("other-rewards", swapped_rewards)),
    "mean over the micro-batch": (
        "micro-batches", loss_class("mean", lambda s, b: LossOutput(dpo(s, b).loss / len(b.chosen.mask))),
    ),
    "mean over the tokens of the micro-batch": (
        "micro-batches",
        loss_class(
            "token-mean", lambda s, b: LossOutput(surprise(b.completion).sum(-1) / b.completion.mask.sum()),
            "demonstrations", False, NoSettings,
        ),
    ),
    "a scalar": ("contract", loss_class("scalar", lambda s, b: LossOutput(dpo(s, b).loss.mean()))),
    "a reserved metric": ("contract", loss_class("reserved", with_metric("grad_norm", lambda b: margin(b).detach()))),
    "a metric with its gradient": ("contract", loss_class("attached", with_metric("margin", margin))),
    "counts by values that are not 0": ("padding", loss_class("by-values", by_values, needs=False)),
    "mask ignored": (
        "padding",
        loss_class(
            "unmasked", lambda s, b: LossOutput(-b.completion.policy.sum(-1)), "demonstrations", False, NoSettings,
        ),
    ),
    "width taken for a length": (
        "padding",
        loss_class(
            "width", lambda s, b: LossOutput(-b.completion.sum() / b.completion.mask.shape[1]), "demonstrations", False,
            NoSettings,
        ),
    ),
    "setting ignored": ("settings", loss_class("ignored", dpo, Settings=Smoothing)),
    "log(1 - exp)": ("finite", loss_class("odds", odds, needs=False)),
    "log of a sigmoid": (
        "finite", loss_class("log-sigmoid", lambda s, b: LossOutput(-torch.sigmoid(s.settings.beta * margin(b)).log())),
    ),
    "nan in a branch that is not taken": (
        "finite",
        loss_class("root", lambda s, b: LossOutput(
            torch.where(margin(b) < 0, -margin(b), torch.where(margin(b) > 0, margin(b).sqrt(), 0.0)))),
    ),
    "reference dropped": (
        "reference",
        loss_class(
            "dropped", lambda s, b: LossOutput(-logsigmoid(s.settings.beta * (b.chosen.sum() - b.rejected.sum()))),
        ),
    ),
    "reference used in secret": (
        "reference",
        loss_class(
            "secret",
            lambda s, b: LossOutput(-b.chosen.mean() if b.chosen.reference is None else -b.chosen.log_ratio("mean")),
            needs=False, Settings=NoSettings,
        ),
    ),
    "in-place write": ("inputs", loss_class("in-place", in_place)),
    "neighbours compared": ("order", loss_class("rolled", rolled)),
    "state kept": ("stateless", loss_class("remembers", remembers)),
    "random": ("deterministic", loss_class("shuffled", shuffled)),
    "mask by log-probs": ("units", loss_class("moved-mask", moved_mask)),
    "counts tokens outside of the completion": (
        "units", loss_class("every-token", every_token, "demonstrations", False, NoSettings),
    ),
    "bound missing": (
        "bounds",
        loss_class(
            "unbounded", lambda s, b: LossOutput((margin(b) - 1 / (2 * s.settings.tau)) ** 2), Settings=Unbounded,
        ),
    ),
    "nan metric": (
        "metrics", loss_class("nan", with_metric("x", lambda b: margin(b).detach() * 0 / margin(b).detach())),
    ),
    "unfit name of a metric": ("metrics", loss_class("name", with_metric("my metric", lambda b: margin(b).detach()))),
    "wrong gradient": (
        "gradient",
        loss_class("doubled", lambda s, b: LossOutput(-logsigmoid(s.settings.beta * _Wrong.apply(margin(b))))),
    ),
    "false invariance": (
        "invariances",
        loss_class("no-shift", lambda s, b: LossOutput(dpo(s, b).loss + b.chosen.mean()),
                   invariances=frozenset({"shift"})),
    ),
    "entropy asked for and not read": ("requests", loss_class("idle-entropy", dpo, token_stats=frozenset({"entropy"}))),
    "column declared and not read": ("requests", loss_class("idle-column", dpo, columns=("weight",))),
    "column read and not declared": ("requests", loss_class("hidden-column", row_weights)),
    "column declared for other settings": (
        "requests",
        loss_class("other-column", weighted_by, Settings=Weighted, columns=property(declared_the_wrong_way)),
    ),
    "division by a count of labels": ("empty", loss_class("labels", ratio_of_labels, "labelled")),
    "division by a deviation of 0": (
        "empty",
        loss_class("deviation", reinforce, "groups", False, NoSettings, prepare=group_deviation, prepare_pass=False),
    ),
}  # fmt: skip


# --- right, and hard to judge ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sigmoid:
    beta: float = setting(0.05, "scale of the log-ratios", gt=0)
    tau: float = setting(0.05, "how sudden the change from one loss to the other is", gt=0)


def discovered(self: Any, batch: Any) -> LossOutput:
    """A loss that grows with the margin where that is near 0."""
    x = self.settings.beta * margin(batch)
    modulation = torch.sigmoid(x / self.settings.tau)
    return LossOutput(-logsigmoid(x) * (1 - modulation) + torch.exp(-x.clamp(min=-20)) * modulation)


def weighted(self: Any, batch: Any) -> LossOutput:
    """Weights out of the policy, held constant."""
    weight = (batch.chosen.mean() + batch.rejected.mean()).detach().exp()
    return LossOutput(weight * dpo(self, batch).loss, metrics={"weight": weight})


@dataclass(frozen=True)
class Column:
    column: str = setting("score", "the column of data.keep with the margin that is wanted")
    offset: float | None = setting(None, "a margin for all rows, beside the column's", ge=0)


def column_margin(self: Any, batch: Any) -> LossOutput:
    wanted = batch.extra[self.settings.column] + (self.settings.offset or 0.0)
    return LossOutput(-logsigmoid(0.1 * margin(batch) - wanted))


def weighted_where_given(self: Any, batch: Any) -> LossOutput:
    """Columns that it can do without need no declaration."""
    loss = dpo(self, batch).loss
    if "weight" in batch.extra:
        loss = loss * batch.extra["weight"]
    return LossOutput(loss * batch.extra.get("scale", 1.0))


@dataclass(frozen=True)
class Moving:
    beta: float = setting(0.1, "scale of the rewards", gt=0)
    decay: float = setting(0.9, "weight of the baseline so far", ge=0, le=1)
    undesirable_weight: float = setting(1.0, "weight of undesirable rows", ge=0)


def moving_baseline(self: Any, step: Any, state: Any) -> Any:
    """decay matters from the second step on only, through the state."""
    now = self.settings.beta * step.completion.log_ratio().mean()
    baseline = self.settings.decay * state["baseline"] + (1 - self.settings.decay) * now
    return {"baseline": state["baseline"].to(now.dtype)}, {"baseline": baseline.float()}


def binary(self: Any, batch: Any) -> LossOutput:
    gain = self.settings.beta * batch.completion.log_ratio() - batch.step["baseline"]
    loss = torch.where(batch.label, -logsigmoid(gain), -self.settings.undesirable_weight * logsigmoid(-gain))
    return LossOutput(loss, rewards=gain.detach())


@dataclass(frozen=True)
class Clipped:
    epsilon: float = setting(0.2, "how far the ratio may be from 1", gt=0, lt=1)
    beta: float = setting(0.0, "weight of the KL divergence from the reference", ge=0)
    scale: Literal["group", "none"] = setting("group", "what advantages are divided by")
    mask_truncated: bool = setting(False, "leave out completions that were cut off")
    max_length: int = setting(512, "the tokens that count at most", ge=1)


def advantages(self: Any, step: Any, state: Any) -> Any:
    rewards, found = step.rewards.nan_to_num(0.0), torch.zeros_like(step.rewards)
    for group in step.group.unique():
        inside = step.group == group
        centred = rewards[inside] - rewards[inside].mean()
        spread = rewards[inside].std(correction=0) + 1e-4 if self.settings.scale == "group" else 1.0
        found[inside] = centred / spread
    return {"advantage": found}, state


def clipped(self: Any, batch: Any) -> LossOutput:
    settings, side = self.settings, batch.completion
    mask = side.mask & (side.mask.cumsum(-1) <= settings.max_length)
    if settings.mask_truncated:
        mask = mask & ~batch.truncated[:, None]
    old = side.policy.detach() if batch.old is None else batch.old
    ratio = (side.policy - old).masked_fill(~mask, 0.0).exp()  # (N, T)
    advantage = batch.step["advantage"].to(ratio.dtype)[:, None]
    bound = ratio.clamp(1 - settings.epsilon, 1 + settings.epsilon)
    loss = -torch.minimum(ratio * advantage, bound * advantage)
    if settings.beta:
        gap = (side.reference - side.policy).masked_fill(~mask, 0.0)
        loss = loss + settings.beta * (gap.exp() - gap - 1)
    share = alignzoo.metric((ratio != bound).double().detach(), where=mask)
    return LossOutput(loss, per="token", mask=mask, metrics={"clipped": share})


def truncated_importance(self: Any, batch: Any) -> LossOutput:
    """The ratio is a weight, held constant; advantages need no prepare where a group is whole."""
    side = batch.completion
    old = side.policy.detach() if batch.old is None else batch.old
    weight = (side.policy - old).masked_fill(~side.mask, 0.0).exp().clamp(max=2.0).detach()
    rewards, sums = batch.rewards.nan_to_num(0.0).to(weight.dtype), torch.zeros_like(batch.rewards, dtype=weight.dtype)
    counts = sums.index_add(0, batch.group, torch.ones_like(rewards))
    mean = (sums.index_add(0, batch.group, rewards) / counts.clamp(min=1))[batch.group]
    return LossOutput(weight * (rewards - mean)[:, None] * surprise(side), per="token", mask=side.mask)


def certain_tokens(self: Any, batch: Any) -> LossOutput:
    """Counts only tokens that were not the most probable ones already: a mask out of the data, sometimes empty."""
    side = batch.completion
    focus = LossOutput(surprise(side), per="token", mask=side.mask & ~side.is_top1)
    entropy = alignzoo.metric(side.entropy, where=side.mask)
    return LossOutput(surprise(side).sum(-1) * 0.1, metrics={"mean_entropy": entropy}) + focus


@dataclass(frozen=True)
class Kind:
    beta: float = setting(0.1, "scale of the log-ratios", gt=0)
    gamma: float = setting(0.0, "target margin")
    kind: Literal["hinge", "down", "robust", "squared"] = setting("hinge", "which loss")
    flip: float = setting(0.1, 'probability that a label is wrong, of kind = "robust"', ge=0, lt=0.5)


def many_kinds(self: Any, batch: Any) -> LossOutput:
    settings = self.settings
    chosen, rejected = (settings.beta * s.log_ratio() for s in (batch.chosen, batch.rejected))
    x = chosen - rejected - settings.gamma
    kinds = {
        "hinge": lambda: (1 - x).relu(),
        "down": lambda: torch.sigmoid(chosen - settings.gamma) + torch.sigmoid(-x),
        "robust": lambda: (
            (-(1 - settings.flip) * logsigmoid(x) + settings.flip * logsigmoid(-x)) / (1 - 2 * settings.flip)
        ),
        "squared": lambda: (chosen - settings.gamma - 5) ** 2 + (rejected + 5) ** 2,
    }
    return LossOutput(kinds[settings.kind](), rewards=(chosen.detach(), rejected.detach()))


def unlearn(self: Any, batch: Any) -> LossOutput:
    return LossOutput(-2 / self.settings.beta * logsigmoid(-self.settings.beta * batch.completion.log_ratio()))


@dataclass(frozen=True)
class Quantile:
    top: float = setting(0.5, "the share of rows with the largest margins that count", gt=0, le=1)


def ranks(self: Any, step: Any, state: Any) -> Any:
    """Which rows count, by their place in the sorted margins of the step."""
    gain = step.chosen.mean() - step.rejected.mean()
    kept = max(1, round(self.settings.top * len(gain)))
    per_row = gain >= gain.sort(descending=True).values[kept - 1]
    return {"kept": per_row.repeat_interleave(2)}, state  # one for each completion


def top_rows(self: Any, batch: Any) -> LossOutput:
    loss = -logsigmoid(batch.chosen.mean() - batch.rejected.mean())
    return LossOutput(loss, mask=batch.step["kept"][::2])


def kl_declared(self: Any) -> bool:
    return bool(self.settings.beta > 0)


RIGHT: dict[str, Any] = {
    "discovered": loss_class("discovered", discovered, Settings=Sigmoid),
    "weighted": loss_class("weighted", weighted),
    "column": loss_class(
        "column", column_margin, Settings=Column, columns=property(lambda self: (self.settings.column,)),
    ),
    "optional column": loss_class("optional", weighted_where_given),
    "moving baseline": loss_class(
        "moving", binary, "labelled", Settings=Moving, prepare=moving_baseline,
        init_state=lambda self: {"baseline": torch.zeros(())},
    ),
    "clipped": loss_class(
        "clipped", clipped, "groups", property(kl_declared), Clipped, prepare=advantages, prepare_pass=False,
        invariances=frozenset({"reward_shift", "prompt_length"}),
    ),
    "truncated importance": loss_class("importance", truncated_importance, "groups", False, NoSettings),
    "certain tokens": loss_class(
        "certain", certain_tokens, "demonstrations", False, NoSettings, token_stats=frozenset({"is_top1", "entropy"}),
    ),
    "many kinds": loss_class("kinds", many_kinds, Settings=Kind, invariances=frozenset({"shift", "token_order"})),
    "unlearning": loss_class("unlearn", unlearn, "demonstrations", invariances=frozenset({"forgets"})),
    "top rows": loss_class("top-rows", top_rows, needs=False, Settings=Quantile, prepare=ranks),
}  # fmt: skip
