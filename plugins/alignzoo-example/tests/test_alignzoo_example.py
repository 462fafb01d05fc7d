"""The example's loss: numbers by hand, the definition of f, gradients, and the two limits."""

from __future__ import annotations

import math

import pytest
import torch
from alignzoo_example import FDPOJensenShannon
from torch.autograd import gradcheck

import alignzoo

LN3 = math.log(3)


def completion(log_ratios: list[float] | torch.Tensor) -> alignzoo.LogProbs:
    """Two tokens each: the reference gives both -1, and the policy the log-ratio more, half on each."""
    ratio = torch.as_tensor(log_ratios, dtype=torch.float64)
    mask = torch.ones(len(ratio), 2, dtype=torch.bool)
    reference = torch.full((len(ratio), 2), -1.0, dtype=torch.float64)
    return alignzoo.LogProbs(policy=reference + ratio[:, None] / 2, reference=reference, mask=mask, owner="fdpo-js")


def loss_of(chosen: list[float] | torch.Tensor, rejected: list[float] | torch.Tensor, beta: float) -> torch.Tensor:
    pairs = alignzoo.Pairs(chosen=completion(chosen), rejected=completion(rejected))
    return FDPOJensenShannon(beta=beta)(pairs).loss


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
    def f(u: float) -> float:
        return u * math.log(u) - (1 + u) * math.log((1 + u) / 2)

    ratios, beta, step = [-2.0, -0.3, 0.0, 0.7, 3.0], 0.3, 1e-5
    pairs = alignzoo.Pairs(chosen=completion(ratios), rejected=completion([0.0] * 5))
    rewards = FDPOJensenShannon(beta=beta)(pairs).rewards
    assert isinstance(rewards, tuple)
    slopes = [beta * (f(math.exp(r) + step) - f(math.exp(r) - step)) / (2 * step) for r in ratios]
    assert rewards[0].tolist() == pytest.approx(slopes, abs=1e-8)
    assert rewards[1].tolist() == pytest.approx([0.0] * 5, abs=1e-12)  # f'(1) = 0


def test_gradient() -> None:
    torch.manual_seed(0)
    chosen, rejected = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert gradcheck(lambda c, r: loss_of(c, r, 0.7), (chosen, rejected))


def test_the_chosen_side_is_bounded() -> None:
    ratio = torch.tensor([1e4], dtype=torch.float64, requires_grad=True)
    loss = loss_of(ratio, [0.0], 1.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(3 / 2))  # f' -> log 2: h = log 2
    assert ratio.grad is not None and ratio.grad.abs().item() < 1e-12


def test_the_rejected_side_is_not_bounded_and_stays_finite() -> None:
    ratio = torch.tensor([1e4, -1e4], dtype=torch.float64, requires_grad=True)
    loss = loss_of([0.0, 0.0], ratio, 1.0)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([math.log(3), 0.0], abs=1e-9)  # h = -log 2, and h -> infinity
    assert ratio.grad is not None and torch.isfinite(ratio.grad).all()


def test_a_beta_out_of_bounds_is_refused() -> None:
    with pytest.raises(alignzoo.AlignzooError, match="beta = 0"):
        FDPOJensenShannon(beta=0.0)
