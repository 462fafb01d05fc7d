"""RRHF and alpha-DPO: numbers by hand, the authors' formulas, the states of steps, and the engine."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from alignzoo_losses.alpha_dpo import AlphaDPO
from alignzoo_losses.rrhf import RRHF
from alignzoo_losses.simpo import SimPO
from conftest import make_trees
from loss_helpers import completion, gradcheck_loss, gradients, make_pairs, random_completion, total, units
from test_engine import error, update_of
from test_losses_grpo import logged

import alignzoo

NONE = math.nan


def ranked(part: alignzoo.LogProbs, rewards: list[float], group: list[int]) -> alignzoo.Groups:
    return alignzoo.Groups(
        completion=part, rewards=torch.tensor(rewards), group=torch.tensor(group),
        truncated=torch.zeros(len(group), dtype=torch.bool),
    )  # fmt: skip


# --- rrhf -------------------------------------------------------------------------------------------------------------


def test_rrhf_by_hand() -> None:
    """p = -1, -2 and -0.5 with rewards 3, 2 and 1: the last is ahead of the first by 0.5 and of the second by 1.5."""
    part = completion([[-0.5, -1.5], [-2.0], [-0.25, -0.5, -0.75]], requires_grad=True)
    batch = ranked(part, [3.0, 2.0, 1.0], [0, 0, 0])
    assert units(RRHF(nll_weight=0.0)(batch)) == pytest.approx([0.5 + 1.5])
    assert units(RRHF()(batch)) == pytest.approx([2.0 + 2.0])  # 2 nats of the best answer
    assert logged(batch, RRHF()) == pytest.approx(
        {"rank_loss": 2.0, "nll_loss": 1.0, "rank_accuracy": 1 / 3}
        | {k: v for k, v in logged(batch, RRHF()).items() if "logps" in k}
    )
    found = gradients(RRHF(), batch)["completion"]
    assert found[part.mask].tolist() == pytest.approx([-0.5 - 1, -0.5 - 1, -1.0, 2 / 3, 2 / 3, 2 / 3])


def test_rrhf_compares_within_a_prompt_what_has_different_rewards() -> None:
    part = completion([[-1.0], [-4.0], [-3.0], [-2.0], [-9.0], [-0.5]])
    batch = ranked(part, [0.0, 1.0, 1.0, 5.0, NONE, NONE], [0, 0, 0, 1, 1, 2])
    output = RRHF()(batch)
    mask = output.terms[0].mask
    assert mask is not None and mask.tolist() == [False, True, False, True, False, False]  # the first of the two best
    assert units(output) == pytest.approx([3.0 + 2.0 + 4.0, 2.0])
    assert logged(batch, RRHF())["rank_accuracy"] == 0.0


def test_rrhf_without_any_reward_learns_nothing() -> None:
    batch = ranked(random_completion(0, 3, 4, requires_grad=True), [NONE] * 3, [0, 0, 1])
    assert units(RRHF()(batch)) == [] and not {"rank_loss", "nll_loss", "rank_accuracy"} & logged(batch, RRHF()).keys()


@pytest.mark.parametrize("seed", range(4))
def test_rrhf_is_the_authors_loss(seed: int) -> None:
    """Their script: 100 times the sum of p_i - p_j where that is above 0 and R_j > R_i, and the best answer's surprise
    per token; for one prompt."""
    part = random_completion(seed, 5, 6, requires_grad=True)
    rewards = torch.rand(5, generator=torch.Generator().manual_seed(seed))
    log_probs = part.policy.masked_fill(~part.mask, 0.0)
    p = log_probs.sum(-1) / part.mask.sum(-1)
    difference, of_rewards = p.unsqueeze(0) - p.unsqueeze(-1), rewards.unsqueeze(0) - rewards.unsqueeze(-1)
    best = int(rewards.argmax())
    length = int(part.mask[best].sum())
    theirs = -100 * difference[(of_rewards > 0) & (difference < 0)].sum() - log_probs[best].sum() / length
    batch = ranked(part, rewards.tolist(), [0] * 5)
    loss = RRHF(nll_weight=1 / (100 * length))
    assert 100 * total(loss(batch)).item() == pytest.approx(theirs.item(), rel=1e-6)
    (expected,) = torch.autograd.grad(theirs, part.policy)
    assert torch.allclose(100 * gradients(loss, batch)["completion"], expected, rtol=1e-6)
    gradcheck_loss(loss, batch)


def test_a_step_of_rrhf_does_not_depend_on_the_micro_batches() -> None:
    rewards = [[1.0, 0.0, 0.5], [0.2, 0.2, 0.2], [3.0, NONE, 1.0], [0.0, -2.0, 1.0], [NONE, NONE, NONE]]
    trees = [
        dataclasses.replace(t, rewards=tuple(r), truncated=None)
        for t, r in zip(make_trees(5, 3, 3), rewards, strict=True)
    ]
    whole, metrics = update_of(RRHF(), trees, engine__tokens_per_device=100_000, train__learning_rate=1.0)
    assert whole.norm() > 0.01 and 0 <= metrics["rank_accuracy"] <= 1
    for budget in (1, 60):
        update, again = update_of(RRHF(), trees, engine__tokens_per_device=budget, train__learning_rate=1.0)
        assert error(update, whole) < 1e-5
        for name in ("loss", "rank_loss", "nll_loss", "rank_accuracy"):
            assert again[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name


# --- alpha-dpo --------------------------------------------------------------------------------------------------------


def stats(part: alignzoo.LogProbs) -> alignzoo.api.SequenceStats:
    reference = part.reference.masked_fill(~part.mask, 0.0).sum(-1) if part.reference is not None else None
    return alignzoo.api.SequenceStats(part.sum().detach(), part.lengths, reference)


def prepared(loss: AlphaDPO, batch: alignzoo.Pairs, state: dict[str, Any]) -> tuple[alignzoo.Pairs, dict[str, Any]]:
    rows = torch.arange(len(batch.chosen.mask))
    values, state = loss.prepare(
        alignzoo.Step(rows=rows, chosen=stats(batch.chosen), rejected=stats(batch.rejected)), state
    )
    return dataclasses.replace(batch, step=values), state


def margins(batch: alignzoo.Pairs) -> list[float]:
    """M of each pair."""
    return (batch.chosen.log_ratio("mean") - batch.rejected.log_ratio("mean")).tolist()


def test_alpha_dpo_by_hand() -> None:
    """M = 1 and -1: mean 0, std 2^0.5. One token each, so r = beta log pi; policy -1 and -1 against -2 and -1."""
    batch = alignzoo.Pairs(
        chosen=completion([[-1.0], [-1.0]], [[-1.5], [-0.5]], requires_grad=True),
        rejected=completion([[-2.0], [-1.0]], [[-1.5], [-1.5]], requires_grad=True),
    )
    loss = AlphaDPO(beta=2.0, gamma=0.5, alpha=0.25)
    batch, _ = prepared(loss, batch, loss.init_state())
    z = 1 / (math.sqrt(2) + 1e-4)
    h = [2.0 - 0.5 - 0.25 * z, 0.0 - 0.5 + 0.25 * z]
    assert units(loss(batch)) == pytest.approx([math.log1p(math.exp(-x)) for x in h], rel=1e-12)
    slopes = [-2.0 / (1 + math.exp(x)) / 2 for x in h]  # nothing of it comes through the margin
    found = gradients(loss, batch)
    assert found["chosen"][:, 0].tolist() == pytest.approx(slopes)
    assert found["rejected"][:, 0].tolist() == pytest.approx([-s for s in slopes])
    rewards = loss(batch).rewards
    assert isinstance(rewards, tuple) and [r.tolist() for r in rewards] == [[-2.0, -2.0], [-4.0, -2.0]]


@pytest.mark.parametrize("seed", range(3))
def test_alpha_dpo_is_the_authors_loss(seed: int) -> None:
    """Their trainer on log-probs per token, with its two averages given; gamma and alpha are multiplied by beta there.

    That is their code. That the paper's equation has alpha in the unit of the rewards, as it has gamma, is from memory
    and not certain; the value of a run depends on it only through what number is given for alpha.
    """
    beta, ratio, alpha = 2.5, 0.6, 0.2
    loss = AlphaDPO(beta=beta, gamma=ratio * beta, alpha=alpha * beta)
    batch, _ = prepared(loss, make_pairs(seed, requires_grad=True), loss.init_state())
    policy = batch.chosen.mean() - batch.rejected.mean()
    ahead = policy - (policy - torch.tensor(margins(batch), dtype=torch.float64)).detach()
    target = alpha * (ahead - ahead.mean()) / (ahead.std() + 1e-4) + ratio
    theirs = torch.nn.functional.softplus(-beta * (policy - target.detach()))
    assert units(loss(batch)) == pytest.approx(theirs.tolist(), rel=1e-9)
    inputs = [batch.chosen.policy, batch.rejected.policy]
    for found, expected in zip(
        gradients(loss, batch).values(), torch.autograd.grad(theirs.mean(), inputs), strict=True
    ):
        assert torch.allclose(found, expected, rtol=1e-9)


def test_alpha_dpo_with_alpha_0_is_simpo() -> None:
    loss, batch = AlphaDPO(alpha=0.0, beta=1.7, gamma=0.4), make_pairs(2)
    assert not loss.needs_reference and not loss.prepare_pass and loss.init_state() == {}
    assert units(loss(batch)) == units(SimPO(beta=1.7, gamma=0.4)(batch))


def test_mean_and_std_of_alpha_dpo_are_weighted_over_steps() -> None:
    """The weights 0.8^k of earlier steps, which add up to 1 with that of the step itself; a pair alone has no std."""
    loss = AlphaDPO(momentum=0.8)
    state, steps = loss.init_state(), [make_pairs(0, 5), make_pairs(9, 1), make_pairs(2, 3)]
    means, stds = [], []
    for n, step in enumerate(steps):
        values, state = prepared(loss, step, state)
        found = torch.tensor(margins(step), dtype=torch.float64)
        means.append(found.mean().item())
        stds += [found.std().item()] if len(found) > 1 else []
        assert values.step["mean"].item() == pytest.approx(weighted(means), rel=1e-9), n
        assert values.step["std"].item() == pytest.approx(weighted(stds), rel=1e-9), n
    alone, _ = prepared(loss, make_pairs(9, 1), loss.init_state())
    assert alone.step["std"].item() == 0.0 and units(loss(alone)) == pytest.approx(
        units(SimPO(beta=2.5, gamma=1.5)(alone))
    )


def weighted(values: list[float]) -> float:
    weights = [0.8**k for k in range(len(values))][::-1]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def test_a_step_of_alpha_dpo_does_not_depend_on_the_micro_batches() -> None:
    trees = [dataclasses.replace(t, mismatched=None) for t in make_trees(7, 3, 2)]
    whole, metrics = update_of(AlphaDPO(), trees, engine__tokens_per_device=100_000, train__learning_rate=1.0)
    assert whole.norm() > 0.01
    for budget in (1, 60):
        update, again = update_of(AlphaDPO(), trees, engine__tokens_per_device=budget, train__learning_rate=1.0)
        assert error(update, whole) < 1e-5
        for name in ("loss", "target_margin", "rewards/margins"):
            assert again[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5), name
