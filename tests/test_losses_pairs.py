"""IPO, hinge and ORPO by hand: numbers worked on paper, their gradients, what they do where others break."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext
from typing import Any

import pytest
import torch
from alignzoo_losses.hinge import Hinge
from alignzoo_losses.ipo import IPO
from alignzoo_losses.orpo import HIGHEST, ORPO, log_odds
from loss_helpers import completion, gradients, pairs_with_log_ratios, total, units, units_by_term

import alignzoo
from alignzoo.api import Metric

SAME = [[-0.5, -3.0], [-1.0], [-2.0, 0.0]]


def same(requires_grad: bool = False) -> alignzoo.Pairs:
    """Policy equal to reference; chosen and rejected of different lengths."""
    chosen, rejected = (completion(rows, rows, requires_grad=requires_grad) for rows in (SAME, SAME[::-1]))
    return alignzoo.Pairs(chosen=chosen, rejected=rejected)


def lists(rewards: Any) -> list[list[float]]:
    assert isinstance(rewards, tuple)
    return [side.tolist() for side in rewards]


# --- ipo --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("delta", "expected"), [(0, 25.0), (5, 0.0), (6, 1.0), (4, 1.0), (-3, 64.0), (105, 10000.0)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ipo_by_hand(delta: float, expected: float, reduction: str) -> None:
    """(delta - 5)^2 with tau 0.1; the completions have two tokens, so that an average of delta is a sum of 2 delta."""
    tokens = {"mean": 2, "sum": 1}[reduction]
    for chosen in (0.0, delta, -3.5):
        batch = pairs_with_log_ratios([chosen * tokens], [(chosen - delta) * tokens])
        assert units(IPO(tau=0.1, reduction=reduction)(batch)) == pytest.approx([expected], abs=1e-9)


@pytest.mark.parametrize(("delta", "slope"), [(6.0, 2.0), (4.0, -2.0), (0.0, -10.0)])
def test_ipo_gradient_by_hand(delta: float, slope: float) -> None:
    """d loss / d delta = 2 (delta - 5), shared by the two tokens: also beyond the target, where it pulls back."""
    batch = pairs_with_log_ratios([2 * delta], [0.0], requires_grad=True)
    found = gradients(IPO(tau=0.1), batch)
    assert found["chosen"].tolist() == [pytest.approx([slope / 2, slope / 2, 0.0])]
    assert found["rejected"].tolist() == [pytest.approx([-slope / 2, -slope / 2, 0.0])]
    found = gradients(IPO(tau=0.1, reduction="sum"), pairs_with_log_ratios([delta], [0.0], requires_grad=True))
    assert found["chosen"].tolist() == [pytest.approx([slope, slope, 0.0])]


def test_ipo_averages_over_the_tokens_of_each_side() -> None:
    """Chosen: 3 tokens that gain 1, 2 and 3 nats, mean 2. Rejected: one that loses 1. Delta 3 against 5; by sums 7."""
    chosen = completion([[-1.0, -1.0, -1.0]], [[-2.0, -3.0, -4.0]])
    batch = alignzoo.Pairs(chosen=chosen, rejected=completion([[-2.0]], [[-1.0]]))
    averaged, summed = IPO(tau=0.1)(batch), IPO(tau=0.1, reduction="sum")(batch)
    assert (units(averaged), units(summed)) == ([pytest.approx(4.0)], [pytest.approx(4.0)])
    assert lists(averaged.rewards) == [[pytest.approx(0.2)], [pytest.approx(-0.1)]]
    assert lists(summed.rewards) == [[pytest.approx(0.6)], [pytest.approx(-0.1)]]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ipo_where_the_policy_is_the_reference(reduction: str) -> None:
    for tau in (0.1, 0.01, 2.0):
        output = IPO(tau=tau, reduction=reduction)(same())
        assert units(output) == pytest.approx([1 / (4 * tau**2)] * 3, rel=1e-12)
        assert lists(output.rewards) == [[0.0] * 3] * 2


def test_ipo_at_its_target_has_a_reward_margin_of_one_half() -> None:
    for tau in (0.05, 0.5):
        output = IPO(tau=tau)(pairs_with_log_ratios([1 / tau], [0.0]))  # two tokens: an average of 1 / (2 tau)
        chosen, rejected = lists(output.rewards)
        assert units(output) == [pytest.approx(0.0, abs=1e-12)]
        assert chosen[0] - rejected[0] == pytest.approx(0.5)


# --- hinge ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("margin", "expected"), [(0, 1.0), (10, 0.0), (20, 0.0), (6, 0.4), (-5, 1.5), (9.5, 0.05)])
def test_hinge_by_hand(margin: float, expected: float) -> None:
    for chosen in (0.0, margin, -3.5):
        batch = pairs_with_log_ratios([chosen], [chosen - margin])
        assert units(Hinge(beta=0.1)(batch)) == pytest.approx([expected], abs=1e-9)


def test_hinge_gradient_by_hand() -> None:
    """-beta for each chosen token within the margin and 0 beyond it; a pair that is done still counts in the mean."""
    batch = pairs_with_log_ratios([4.0, 20.0], [-2.0, 0.0], requires_grad=True)
    found = gradients(Hinge(beta=0.1), batch)
    assert found["chosen"].tolist() == [pytest.approx([-0.05, -0.05, 0.0]), [0.0, 0.0, 0.0]]
    assert found["rejected"].tolist() == [pytest.approx([0.05, 0.05, 0.0]), [0.0, 0.0, 0.0]]
    assert total(Hinge(beta=0.1)(batch)).item() == pytest.approx(0.2)


def test_hinge_sums_tokens() -> None:
    """Chosen gains 1, 2 and 3 nats and rejected loses 1: a margin of 7, whatever the lengths."""
    chosen = completion([[-1.0, -1.0, -1.0]], [[-2.0, -3.0, -4.0]])
    output = Hinge(beta=0.1)(alignzoo.Pairs(chosen=chosen, rejected=completion([[-2.0]], [[-1.0]])))
    assert units(output) == pytest.approx([0.3])
    assert lists(output.rewards) == [pytest.approx([0.6]), pytest.approx([-0.1])]


def test_hinge_where_the_policy_is_the_reference() -> None:
    assert units(Hinge(beta=0.7)(same())) == [1.0] * 3
    gradient = gradients(Hinge(beta=0.1), same(requires_grad=True))["chosen"]
    assert gradient[same().chosen.mask].tolist() == pytest.approx([-0.1 / 3] * 5)


# --- orpo -------------------------------------------------------------------------------------------------------------


def half_and_quarter(**options: Any) -> alignzoo.Pairs:
    """Chosen: p = 1/2, the geometric mean of 1/4 and 1, so even odds. Rejected: p = 1/4, odds of 1/3. Odds ratio 3."""
    chosen = completion([[math.log(0.25), 0.0]], **options)
    return alignzoo.Pairs(chosen=chosen, rejected=completion([[math.log(0.25)] * 3], **options))


def test_orpo_by_hand() -> None:
    """NLL: ln 4 and 0 nats, on average ln 2. Odds term: -ln sigmoid(ln 3) = ln(4/3)."""
    output = ORPO(lambda_=0.5)(half_and_quarter())
    assert units_by_term(output) == [pytest.approx([math.log(4), 0.0]), pytest.approx([0.5 * math.log(4 / 3)])]
    assert total(output).item() == pytest.approx(math.log(2) + 0.5 * math.log(4 / 3))
    assert lists(output.rewards) == [pytest.approx([0.5 * math.log(0.5)]), pytest.approx([0.5 * math.log(0.25)])]
    assert output.metrics["log_odds_chosen"].tolist() == pytest.approx([math.log(3)])  # type: ignore[union-attr]
    surprise = output.metrics["nll_loss"]
    assert isinstance(surprise, Metric) and surprise.where is not None
    assert surprise.values[surprise.where].tolist() == pytest.approx([math.log(4), 0.0])


def test_orpo_gradient_by_hand() -> None:
    """-sigmoid(-ln 3) = -1/4, times 1 / (1 - p), shared by the tokens; NLL adds -1/2 to each of two chosen tokens."""
    found = gradients(ORPO(lambda_=0.5), half_and_quarter(requires_grad=True))
    chosen, rejected = -0.5 * (1 / 4) * 2 / 2, 0.5 * (1 / 4) * (4 / 3) / 3
    assert found["chosen"].tolist() == [pytest.approx([-0.5 + chosen, -0.5 + chosen, 0.0])]
    assert found["rejected"].tolist() == [pytest.approx([rejected] * 3 + [0.0])]


def test_orpo_has_units_of_two_kinds() -> None:
    """A pair with 1 chosen token and one with 3: NLL is a mean over 4 tokens, the odds term one over 2 pairs."""
    sides = [completion([[-1.0], [-2.0, -3.0, -4.0]]), completion([[-1.0], [-3.0] * 5])]
    output = ORPO(lambda_=1.0)(alignzoo.Pairs(chosen=sides[0], rejected=sides[1]))
    assert [term.per for term in output.terms] == ["token", "example"]
    assert units_by_term(output) == [[1.0, 2.0, 3.0, 4.0], pytest.approx([math.log(2)] * 2)]
    assert total(output).item() == pytest.approx(2.5 + math.log(2))


def test_orpo_needs_no_reference() -> None:
    assert ORPO().needs_reference is False
    bare = alignzoo.Pairs(chosen=completion([[-1.0, -2.0]]), rejected=completion([[-3.0]]))
    seen = alignzoo.Pairs(chosen=completion([[-1.0, -2.0]], [[-9.0, -9.0]]), rejected=completion([[-3.0]], [[-0.1]]))
    assert units(ORPO()(bare)) == units(ORPO()(seen))


EXACT = [-1e-5, -1e-3, -0.1, -math.log(2), -1.0, -20.0, -80.0, -700.0]


@pytest.mark.parametrize("log_p", EXACT)
def test_log_odds_are_exact(log_p: float) -> None:
    """Against 60 digits, from a completion that is all but certain to one that is all but impossible."""
    getcontext().prec = 60
    p = Decimal(log_p).exp()
    expected = float((p / (1 - p)).ln())
    assert log_odds(torch.tensor(log_p, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-11)
    assert log_odds(torch.tensor(log_p)).item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    leaf = torch.tensor(log_p, dtype=torch.float64, requires_grad=True)
    log_odds(leaf).backward()
    assert leaf.grad is not None
    assert leaf.grad.item() == pytest.approx(float(1 / (1 - p)), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_log_odds_are_finite_everywhere(dtype: torch.dtype) -> None:
    """From 0, where log(1 - exp(x)) is -inf, down to -1e4; they never fall as the probability rises."""
    points = [-1e4, -2500.0, -100.0, -20.0, -1.0, -1e-2, -1e-4, -1e-6, -1e-8, -1e-30, -0.0, 0.0]
    leaf = torch.tensor(points, dtype=dtype, requires_grad=True)
    found = log_odds(leaf)
    found.sum().backward()
    assert leaf.grad is not None
    assert torch.isfinite(found).all() and torch.isfinite(leaf.grad).all()
    assert (found.diff() >= 0).all()
    assert found[-1].item() == pytest.approx(-math.log(-HIGHEST), rel=0.01)
    assert (leaf.grad[:7] >= 1).all() and (leaf.grad[-4:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("certain", ["chosen", "rejected"])
def test_orpo_with_a_certain_completion(certain: str, dtype: torch.dtype) -> None:
    """Every token of it has log-prob 0: the plain formula is 0 or infinite with a gradient of nan."""
    rows = {"chosen": [[-1.0, -1.0]], "rejected": [[-1.0, -1.0]], certain: [[0.0, 0.0]]}
    sides = {name: completion(values, dtype=dtype, requires_grad=True) for name, values in rows.items()}
    batch = alignzoo.Pairs(**sides)
    assert all(math.isfinite(value) for value in units(ORPO()(batch)))
    found = gradients(ORPO(), batch)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    assert (found["chosen"][0, :2] < 0).all() and (found["rejected"][0, :2] >= 0).all()


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        (IPO, {"tau": 0.0}, "tau = 0.0 is out of range"),
        (IPO, {"reduction": "total"}, 'wanted: one of "mean", "sum"'),
        (Hinge, {"beta": -1.0}, "allowed: > 0"),
        (ORPO, {"lambda_": 0.0}, "lambda_ = 0.0 is out of range"),
        (ORPO, {"lambda_": math.inf}, "is not a finite number"),
    ],
)
def test_settings_have_bounds(loss: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(alignzoo.AlignzooError, match=message):
        loss(**settings)


@pytest.mark.parametrize("loss", [IPO, Hinge])
def test_a_reference_is_needed(loss: Any) -> None:
    bare = alignzoo.Pairs(chosen=completion([[-1.0]], owner=loss.name), rejected=completion([[-2.0]], owner=loss.name))
    assert loss().needs_reference is True
    with pytest.raises(alignzoo.AlignzooError, match=f'loss "{loss.name}" asked for log_ratio'):
        loss()(bare)
