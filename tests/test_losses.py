"""The losses against numbers by hand, references written without torch, finite differences, and extreme inputs.

A further loss joins the tests that hold for all of them by one entry in CASES.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from alignzoo_losses.dpo import DPO
from alignzoo_losses.hinge import Hinge
from alignzoo_losses.ipo import IPO
from alignzoo_losses.kto import KTO
from alignzoo_losses.orpo import ORPO
from alignzoo_losses.sft import SFT
from loss_helpers import (
    batch_of,
    completion,
    completions_of,
    gradcheck_loss,
    gradients,
    make_demonstrations,
    make_labelled,
    make_pairs,
    pairs_with_log_ratios,
    row_of,
    tokens,
    total,
    units,
    units_by_term,
)
from zoo_cases import ZOO

import alignzoo
from alignzoo.api import Metric

# --- references: plain floats and loops, from the definitions ---------------------------------------------------------


def sft_reference(batch: alignzoo.Demonstrations, settings: Any) -> list[float]:
    """The surprise of each token that counts, completion after completion."""
    return [-value for row in tokens(batch.completion.policy, batch.completion.mask) for value in row]


def score(side: alignzoo.LogProbs, i: int, *, average: bool = False, free: bool = False) -> float:
    """The log-ratio of one completion, or its log-prob where there is to be no reference."""
    row = tokens(side.policy, side.mask)[i]
    against = [0.0] * len(row)
    if not free:
        assert side.reference is not None
        against = tokens(side.reference, side.mask)[i]
    ratio = 0.0
    for policy, reference in zip(row, against, strict=True):
        ratio += policy - reference
    return ratio / len(row) if average else ratio


def dpo_reference(batch: alignzoo.Pairs, settings: Any) -> list[float]:
    """The expected surprise of the label under Bradley-Terry, from the two probabilities themselves."""
    losses = []
    for i in range(len(batch.chosen.policy)):
        sides = [
            score(side, i, average=settings.length_normalised, free=settings.reference_free)
            for side in (batch.chosen, batch.rejected)
        ]
        odds = math.exp(settings.beta * sides[0]) / math.exp(settings.beta * sides[1])
        right, wrong = odds / (1 + odds), 1 / (1 + odds)
        losses.append((1 - settings.label_smoothing) * -math.log(right) + settings.label_smoothing * -math.log(wrong))
    return losses


def ipo_reference(batch: alignzoo.Pairs, settings: Any) -> list[float]:
    """The squared distance of the margin from half of 1 / tau."""
    losses = []
    for i in range(len(batch.chosen.policy)):
        average = settings.reduction == "mean"
        missing = score(batch.chosen, i, average=average) - score(batch.rejected, i, average=average)
        missing -= 0.5 / settings.tau
        losses.append(missing * missing)
    return losses


def hinge_reference(batch: alignzoo.Pairs, settings: Any) -> list[float]:
    """What the scaled margin lacks of 1."""
    losses = []
    for i in range(len(batch.chosen.policy)):
        margin = settings.beta * score(batch.chosen, i) - settings.beta * score(batch.rejected, i)
        losses.append(1 - margin if margin < 1 else 0.0)
    return losses


def orpo_reference(batch: alignzoo.Pairs, settings: Any) -> list[float]:
    """The surprise of each chosen token; then of each pair the surprise of the odds ratio, from probabilities."""
    surprises = [-value for row in tokens(batch.chosen.policy, batch.chosen.mask) for value in row]
    losses = []
    for i in range(len(batch.chosen.policy)):
        odds = []
        for side in (batch.chosen, batch.rejected):
            probability = math.exp(score(side, i, average=True, free=True))
            odds.append(probability / (1 - probability))
        losses.append(-settings.lambda_ * math.log(odds[0] / (odds[0] + odds[1])))
    return [*surprises, *losses]


def kto_reference(batch: alignzoo.Labelled, settings: Any) -> list[float]:
    """The weight of each row less its value, which grows away from the baseline in the direction of the label."""
    baseline = batch.step["baseline"].item() if settings.baseline == "mismatched" else 0.0
    losses = []
    for i, desirable in enumerate(batch.label.tolist()):
        gain = score(batch.completion, i) - baseline
        weight = settings.desirable_weight if desirable else settings.undesirable_weight
        value = weight / (1 + math.exp(-settings.beta * (gain if desirable else -gain)))
        losses.append(weight - value)
    return losses


@dataclass(frozen=True)
class Case:
    loss: alignzoo.Loss
    make: Callable[..., Any]  # makes a batch: (seed, **options of loss_helpers.completion)
    reference: Callable[[Any, Any], list[float]]  # (batch, settings) -> the values of the units, term after term


CASES = {
    "sft": Case(SFT(), make_demonstrations, sft_reference),
    "dpo": Case(DPO(beta=0.3), make_pairs, dpo_reference),
    "dpo smoothed": Case(DPO(beta=0.3, label_smoothing=0.2), make_pairs, dpo_reference),
    "dpo normalised": Case(DPO(beta=2.0, length_normalised=True), make_pairs, dpo_reference),
    "dpo reference-free": Case(DPO(beta=0.3, reference_free=True), make_pairs, dpo_reference),
    "dpo all": Case(
        DPO(beta=2.0, label_smoothing=0.1, length_normalised=True, reference_free=True), make_pairs, dpo_reference
    ),
    "ipo": Case(IPO(tau=0.3), make_pairs, ipo_reference),
    "ipo sum": Case(IPO(tau=0.05, reduction="sum"), make_pairs, ipo_reference),
    "hinge": Case(Hinge(beta=0.04), make_pairs, hinge_reference),  # no margin is as large as 25 nats: all have a slope
    "orpo": Case(ORPO(lambda_=0.3), make_pairs, orpo_reference),
    "kto": Case(KTO(beta=0.3), make_labelled, kto_reference),
    "kto weighted": Case(KTO(desirable_weight=1.3, undesirable_weight=0.4), make_labelled, kto_reference),
    "kto without baseline": Case(KTO(beta=0.3, baseline="none"), make_labelled, kto_reference),
    **{name: Case(*case) for name, case in ZOO.items()},
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


# --- what holds for every loss ----------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_the_reference(case: Case, seed: int) -> None:
    batch = case.make(seed)
    assert units(case.loss(batch)) == pytest.approx(case.reference(batch, case.loss.settings), rel=1e-10)


@every_case
def test_gradient_is_that_of_the_loss(case: Case) -> None:
    gradcheck_loss(case.loss, case.make(3, n=3))


@every_case
def test_only_tokens_under_the_mask_have_a_gradient(case: Case) -> None:
    batch = case.make(4, requires_grad=True)
    for name, gradient in gradients(case.loss, batch).items():
        mask = completions_of(batch)[name].mask
        assert (gradient[~mask] == 0).all()
        assert (gradient[mask] != 0).all()  # each token counts, also the one whose log-prob is 0


@every_case
def test_what_lies_outside_the_mask_changes_nothing(case: Case) -> None:
    batch = case.make(5)
    changed = {}
    for name, part in completions_of(batch).items():
        reference = None if part.reference is None else part.reference.masked_fill(~part.mask, -1e30)
        changed[name] = dataclasses.replace(part, policy=part.policy.masked_fill(~part.mask, 1e30), reference=reference)
    assert units(case.loss(dataclasses.replace(batch, **changed))) == units(case.loss(batch))


@every_case
def test_a_row_does_not_depend_on_the_rows_beside_it(case: Case) -> None:
    batch = case.make(6)
    alone = [units_by_term(case.loss(row_of(batch, i))) for i in range(5)]
    together = [value for term in zip(*alone, strict=True) for row in term for value in row]
    assert together == pytest.approx(units(case.loss(batch)), rel=1e-12)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_log_probs_stay_finite(case: Case, dtype: torch.dtype) -> None:
    low, high = [-2500.0] * 4, [-1e-4] * 4  # sums of -1e4 and about 0
    against = [high, low, low, high] if case.loss.needs_reference else None
    sides = [
        completion(rows, against, dtype=dtype, requires_grad=True)
        for rows in ([low, high, low, high], [high, low, low, high])
    ]
    batch = batch_of(case.loss.data, sides, baseline=1e4)
    assert all(math.isfinite(value) for value in units(case.loss(batch)))
    assert all(torch.isfinite(gradient).all() for gradient in gradients(case.loss, batch).values())


@every_case
def test_what_is_logged_is_detached_and_per_row(case: Case) -> None:
    output = case.loss(case.make(7, requires_grad=True))
    assert output.loss.requires_grad
    rewards = output.rewards if isinstance(output.rewards, tuple) else (output.rewards,)
    per_row = [*rewards, *(v for v in output.metrics.values() if isinstance(v, torch.Tensor))]
    assert all(values is None or values.shape == (5,) for values in per_row)
    other = [v.values for v in output.metrics.values() if isinstance(v, Metric)]
    assert not any(values is not None and values.requires_grad for values in [*per_row, *other])


# --- sft --------------------------------------------------------------------------------------------------------------


def test_sft_by_hand() -> None:
    batch = alignzoo.Demonstrations(completion=completion([[-1.0, -2.0, 0.0], [-5.0]], requires_grad=True))
    output = SFT()(batch)
    assert units(output) == [1.0, 2.0, 0.0, 5.0]
    assert total(output).item() == 2.0  # 8 nats over 4 tokens, the certain one included; per example it would be 3
    gradient = gradients(SFT(), batch)["completion"]
    assert gradient.tolist() == [[-0.25, -0.25, -0.25, 0.0], [-0.25, 0.0, 0.0, 0.0]]


def test_sft_is_the_cross_entropy_of_the_logits() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, 11, dtype=torch.float64), torch.randint(11, (3, 7))
    mask = torch.arange(7) < torch.tensor([[7], [1], [4]])
    policy = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    output = SFT()(alignzoo.Demonstrations(completion=alignzoo.LogProbs(policy=policy, mask=mask)))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.masked_fill(~mask, -100).flatten())
    assert total(output).item() == pytest.approx(expected.item(), rel=1e-12)


# --- dpo --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margin", "expected"), [(0, 0.693147), (10, 0.313262), (20, 0.126928), (6, 0.437488), (-10, 1.313262)]
)
def test_dpo_by_hand(margin: float, expected: float) -> None:
    """-log sigmoid(0.1 margin), where margin is the difference of the summed log-ratios, split in any way."""
    for chosen in (0.0, margin, -3.5):
        batch = pairs_with_log_ratios([chosen], [chosen - margin])
        assert units(DPO(beta=0.1)(batch)) == pytest.approx([expected], abs=1e-6)


def test_dpo_gradient_by_hand() -> None:
    """d loss / d margin = -beta sigmoid(-beta margin) = -0.1 sigmoid(-0.6); each token of chosen has it."""
    batch = pairs_with_log_ratios([4.0], [-2.0], requires_grad=True)
    found = gradients(DPO(beta=0.1), batch)
    assert found["chosen"].tolist() == [pytest.approx([-0.0354344, -0.0354344, 0.0], abs=1e-7)]
    assert found["rejected"].tolist() == [pytest.approx([0.0354344, 0.0354344, 0.0], abs=1e-7)]


def test_dpo_averages_tokens_where_it_is_told_to() -> None:
    """Chosen: 3 tokens that gain 1, 2 and 3 nats, mean 2. Rejected: one that loses 1. Margin 3, by sums 7; beta 0.5."""
    chosen = completion([[-1.0, -1.0, -1.0]], [[-2.0, -3.0, -4.0]])
    batch = alignzoo.Pairs(chosen=chosen, rejected=completion([[-2.0]], [[-1.0]]))
    normalised = DPO(beta=0.5, length_normalised=True)(batch)
    assert units(normalised) == pytest.approx([math.log(1 + math.exp(-1.5))])
    assert units(DPO(beta=0.5)(batch)) == pytest.approx([math.log(1 + math.exp(-3.5))])
    assert isinstance(normalised.rewards, tuple)
    assert [r.tolist() for r in normalised.rewards] == [pytest.approx([1.0]), pytest.approx([-0.5])]


def test_dpo_without_a_reference() -> None:
    """Chosen has -3 nats and rejected -2; the reference, were it read, would turn the order round."""
    chosen, rejected = completion([[-1.0, -1.0, -1.0]], [[-9.0] * 3]), completion([[-2.0]], [[-1.0]])
    loss, batch = DPO(beta=0.5, reference_free=True), alignzoo.Pairs(chosen=chosen, rejected=rejected)
    assert not loss.needs_reference and DPO().needs_reference
    assert units(loss(batch)) == pytest.approx([math.log(1 + math.exp(0.5))])
    bare = alignzoo.Pairs(chosen=completion([[-1.0, -1.0, -1.0]]), rejected=completion([[-2.0]]))
    assert units(loss(bare)) == units(loss(batch))
    both = DPO(beta=0.5, reference_free=True, length_normalised=True)  # -1 against -2 nats per token
    assert units(both(bare)) == pytest.approx([math.log(1 + math.exp(-0.5))])


def test_dpo_where_the_policy_is_the_reference() -> None:
    """ln 2 whatever the smoothing and the lengths, and already a gradient of beta (1 - 2 eps) / 2 away from chosen."""
    rows = [[-0.5, -3.0], [-1.0], [-2.0, 0.0]]
    sides = [completion(side, side, requires_grad=True) for side in (rows, rows[::-1])]
    batch = alignzoo.Pairs(chosen=sides[0], rejected=sides[1])
    for settings in ({}, {"label_smoothing": 0.3}, {"length_normalised": True}):
        assert units(DPO(**settings)(batch)) == pytest.approx([math.log(2)] * 3, rel=1e-12)
    gradient = gradients(DPO(beta=0.1, label_smoothing=0.3), batch)["chosen"]
    assert gradient[sides[0].mask].tolist() == pytest.approx([-0.1 * 0.4 / 2 / 3] * 5)


def test_dpo_smoothing_is_the_mixture_of_both_orders() -> None:
    batch = make_pairs(8)
    swapped = alignzoo.Pairs(chosen=batch.rejected, rejected=batch.chosen)
    right, wrong = units(DPO(beta=0.4)(batch)), units(DPO(beta=0.4)(swapped))
    mixture = [0.8 * r + 0.2 * w for r, w in zip(right, wrong, strict=True)]
    assert units(DPO(beta=0.4, label_smoothing=0.2)(batch)) == pytest.approx(mixture, rel=1e-12)


def test_dpo_far_margins_grow_linearly() -> None:
    """At h = -1000 the loss is 1000 and its gradient -beta; at +1000 both are 0. Neither overflows in float32."""
    batch = pairs_with_log_ratios([-1e4, 1e4], [0.0, 0.0], dtype=torch.float32, requires_grad=True)
    assert units(DPO(beta=0.1)(batch)) == pytest.approx([1000.0, 0.0], abs=1e-3)
    assert gradients(DPO(beta=0.1), batch)["chosen"][:, 0].tolist() == pytest.approx([-0.05, 0.0])  # mean of 2 rows


def test_dpo_rewards_are_beta_log_ratios() -> None:
    rewards = DPO(beta=0.1)(pairs_with_log_ratios([4.0, 0.0], [-2.0, 5.0])).rewards
    assert isinstance(rewards, tuple)
    assert [r.tolist() for r in rewards] == [pytest.approx([0.4, 0.0]), pytest.approx([-0.2, 0.5])]


def test_dpo_needs_its_reference() -> None:
    bare = alignzoo.Pairs(chosen=completion([[-1.0]], owner="dpo"), rejected=completion([[-2.0]], owner="dpo"))
    with pytest.raises(alignzoo.AlignzooError, match='loss "dpo" asked for log_ratio'):
        DPO()(bare)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta = 0.0 is out of range"),
        ({"beta": -0.1}, "allowed: > 0"),
        ({"label_smoothing": 0.5}, "allowed: >= 0 and < 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing = -0.1"),
        ({"length_normalised": 1}, "wanted: true or false"),
    ],
)
def test_dpo_settings_have_bounds(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(alignzoo.AlignzooError, match=message):
        DPO(**settings)
