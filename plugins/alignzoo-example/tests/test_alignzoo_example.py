"""The example's loss: the conformance kit with a reference function, numbers by hand, and the two limits."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import alignzoo
import pytest
import torch
from alignzoo.testing import conformance

from alignzoo_example import FdpoJsLoss, Settings

LN3 = math.log(3)


def reference(batch: alignzoo.Pairs, settings: Settings) -> list[float]:
    """The definition of the loss, with f' as a finite difference of f and without torch."""

    def f(u: float) -> float:
        return u * math.log(u) - (1 + u) * math.log((1 + u) / 2)

    def reward(log_ratio: float) -> float:
        u = math.exp(log_ratio)
        return settings.beta * (f(u * (1 + 1e-6)) - f(u * (1 - 1e-6))) / (2e-6 * u)

    sides = zip(batch.chosen.log_ratio().tolist(), batch.rejected.log_ratio().tolist(), strict=True)
    return [math.log1p(math.exp(reward(rejected) - reward(chosen))) for chosen, rejected in sides]


test_it_conforms = conformance(FdpoJsLoss, reference=reference)  # a test a check


def completion(log_ratios: list[float] | torch.Tensor) -> alignzoo.LogProbs:
    """Two tokens each: the reference gives both -1, and the policy the log-ratio more, half on each."""
    ratio = torch.as_tensor(log_ratios, dtype=torch.float64)
    mask = torch.ones(len(ratio), 2, dtype=torch.bool)
    reference = torch.full((len(ratio), 2), -1.0, dtype=torch.float64)
    return alignzoo.LogProbs(policy=reference + ratio[:, None] / 2, reference=reference, mask=mask)


def loss_of(chosen: list[float] | torch.Tensor, rejected: list[float] | torch.Tensor, beta: float) -> torch.Tensor:
    pairs = alignzoo.Pairs(chosen=completion(chosen), rejected=completion(rejected))
    return FdpoJsLoss(beta=beta)(pairs).loss


@pytest.mark.parametrize(
    ("chosen", "rejected", "beta", "expected"),
    [
        (0.0, 0.0, 0.5, math.log(2)),  # policy == reference: h = 0
        (LN3, -LN3, 1.0, math.log(4 / 3)),  # u = 3 and 1/3: f' = log 3/2 and log 1/2, h = log 3
        (LN3, -LN3, 2.0, math.log(10 / 9)),  # h = 2 log 3
        (-LN3, LN3, 1.0, math.log(4)),  # the other way round: h = -log 3
        (LN3, 0.0, 1.0, math.log(5 / 3)),  # h = log 3/2; DPO would say log 4/3
    ],
)
def test_numbers_by_hand(chosen: float, rejected: float, beta: float, expected: float) -> None:
    assert loss_of([chosen], [rejected], beta).tolist() == pytest.approx([expected], rel=1e-12)


def test_rewards_are_beta_times_the_derivative_of_f() -> None:
    pairs = alignzoo.Pairs(chosen=completion([LN3, 0.0]), rejected=completion([-LN3, 0.0]))
    rewards = FdpoJsLoss(beta=0.3)(pairs).rewards
    assert isinstance(rewards, tuple)
    assert rewards[0].tolist() == pytest.approx([0.3 * math.log(3 / 2), 0.0], abs=1e-12)
    assert rewards[1].tolist() == pytest.approx([0.3 * math.log(1 / 2), 0.0], abs=1e-12)


def test_the_chosen_side_is_bounded() -> None:
    ratio = torch.tensor([1e4], dtype=torch.float64, requires_grad=True)
    loss = loss_of(ratio, [0.0], 1.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(3 / 2))  # f' -> log 2: h = log 2
    assert ratio.grad is not None and ratio.grad.abs().item() < 1e-12


def test_the_rejected_side_is_not_bounded() -> None:
    assert loss_of([0.0, 0.0], [1e4, -1e4], 1.0).tolist() == pytest.approx([math.log(3), 0.0], abs=1e-9)


def test_the_readme_has_every_setting() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert [field.name for field in dataclasses.fields(Settings) if f"| `{field.name}` |" not in text] == []
