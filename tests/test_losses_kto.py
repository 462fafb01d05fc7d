"""KTO by hand: values, weights, gradients, the baseline of a step, and what is logged of labelled rows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from alignzoo_losses.hinge import Hinge
from alignzoo_losses.kto import KTO
from loss_helpers import (
    completion,
    gradients,
    labelled_with_log_ratios,
    make_labelled,
    pairs_with_log_ratios,
    total,
    units,
)

import alignzoo
from alignzoo.api import SequenceStats
from alignzoo.metrics import Accumulator, record
from alignzoo.objective import check_output


def at(baseline: float, ratios: list[float], labels: list[bool], **options: Any) -> alignzoo.Labelled:
    batch = labelled_with_log_ratios(ratios, labels, **options)
    return dataclasses.replace(batch, step={"baseline": torch.tensor(baseline, dtype=batch.completion.policy.dtype)})


def step_of(policy: list[float], reference: list[float], **more: Any) -> alignzoo.Step:
    """A step whose mismatched completions have these summed log-probs; their lengths must not matter."""
    lengths = torch.arange(1, len(policy) + 1)
    stats = SequenceStats(torch.tensor(policy), lengths, torch.tensor(reference), owner="kto")
    return alignzoo.Step(rows=torch.arange(len(policy)), mismatched=stats, **more)


def logged(batch: alignzoo.Labelled, output: alignzoo.LossOutput) -> dict[str, float]:
    into = Accumulator()
    record(into, "kto", batch, output)
    return into.result()


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "desirable", "undesirable"),
    [(2.0, 0.5, 0.5), (7.0, 0.377541, 0.622459), (-3.0, 0.622459, 0.377541), (22.0, 0.119203, 0.880797)],
)
def test_by_hand(ratio: float, desirable: float, undesirable: float) -> None:
    """beta 0.1 and a baseline of 2 nats: 1 - sigmoid(0.1 (ratio - 2)), mirrored for an undesirable row."""
    found = units(KTO(beta=0.1)(at(2.0, [ratio, ratio], [True, False])))
    assert found == pytest.approx([desirable, undesirable], abs=1e-6)
    weighted = KTO(beta=0.1, desirable_weight=3.0, undesirable_weight=0.5)(at(2.0, [ratio, ratio], [True, False]))
    assert units(weighted) == pytest.approx([3.0 * desirable, 0.5 * undesirable], abs=1e-6)


def test_gradient_by_hand() -> None:
    """-+ weight beta s (1 - s) for each token, s the sigmoid of +-0.5, over 2 rows; the baseline has none of it."""
    slope = 0.1 * 0.377541 * 0.622459 / 2
    batch = at(2.0, [7.0, -3.0], [True, False], requires_grad=True)
    found = gradients(KTO(beta=0.1, desirable_weight=2.0), batch)["completion"]
    assert found.tolist() == [pytest.approx([-2 * slope] * 2 + [0.0]), pytest.approx([slope] * 2 + [0.0])]


def test_where_the_policy_is_the_reference() -> None:
    """Half of each row's weight, and already a slope: up for the desirable row, down for the other."""
    rows = [[-0.5, -3.0], [-1.0], [-2.0, 0.0]]
    batch = alignzoo.Labelled(
        completion=completion(rows, rows, requires_grad=True),
        label=torch.tensor([True, False, False]),
        step={"baseline": torch.tensor(0.0, dtype=torch.float64)},
    )
    for loss in (
        KTO(desirable_weight=1.5, undesirable_weight=0.4),
        KTO(desirable_weight=1.5, undesirable_weight=0.4, baseline="none"),
    ):
        assert units(loss(batch)) == pytest.approx([0.75, 0.2, 0.2], rel=1e-12)
        gradient = gradients(loss, batch)["completion"]
        assert gradient[0, :2].tolist() == pytest.approx([-1.5 * 0.1 / 4 / 3] * 2)
        assert gradient[1:, 0].tolist() == pytest.approx([0.4 * 0.1 / 4 / 3] * 2)


def test_log_ratios_are_sums_over_tokens() -> None:
    """3 tokens that gain 1, 2 and 3 nats are 6 nats above the reference, not 2."""
    batch = alignzoo.Labelled(
        completion=completion([[-1.0, -1.0, -1.0]], [[-2.0, -3.0, -4.0]]), label=torch.tensor([True])
    )
    output = KTO(beta=0.1, baseline="none")(batch)
    assert units(output) == pytest.approx([1 / (1 + math.exp(0.6))])
    assert isinstance(output.rewards, torch.Tensor)
    assert output.rewards.tolist() == pytest.approx([0.6])


@pytest.mark.parametrize("labels", [[True] * 4, [False] * 4, [True, False, False, False]])
def test_every_row_is_a_unit_whatever_the_labels(labels: list[bool]) -> None:
    """One-sided and lopsided rows: the mean over all four, not the sum of two means."""
    output = KTO(beta=0.1, undesirable_weight=2.0)(at(0.0, [10.0, 10.0, 10.0, 10.0], labels))
    right, wrong = 1 / (1 + math.e), 2.0 * math.e / (1 + math.e)
    assert total(output).item() == pytest.approx(sum(right if label else wrong for label in labels) / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_from_the_baseline_it_is_flat_and_finite(dtype: torch.dtype) -> None:
    batch = at(0.0, [1e4, -1e4, 1e4, -1e4], [True, True, False, False], dtype=dtype, requires_grad=True)
    assert units(KTO()(batch)) == [0.0, 1.0, 1.0, 0.0]
    assert (gradients(KTO(), batch)["completion"] == 0).all()


def test_small_losses_do_not_vanish() -> None:
    """1 - sigmoid(30) is 9e-14, which float32 would round to 0 if it were computed so."""
    found = units(KTO(beta=1.0)(at(0.0, [30.0], [True], dtype=torch.float32)))
    assert found == [pytest.approx(9.3576e-14, rel=1e-3, abs=0.0)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta = 0.0 is out of range"),
        ({"desirable_weight": 0.0}, "desirable_weight = 0.0 is out of range"),
        ({"undesirable_weight": -1.0}, "undesirable_weight = -1.0"),
        ({"baseline": "batch"}, 'wanted: one of "mismatched", "none"'),
    ],
)
def test_settings_have_bounds(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(alignzoo.AlignzooError, match=message):
        KTO(**settings)


# --- the baseline -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "reference", "expected"),
    [
        ([-3.0, -6.0, -9.0], [-5.0, -6.0, -14.0], 7 / 3),  # gains 2, 0 and 5
        ([-3.0, -6.0], [-1.0, -7.0], 0.0),  # gains -2 and 1: below 0 on average
        ([-5.0, -4.0], [-1.0, -10.0], 1.0),  # gains -4 and 6: clamped after the mean, not before
        ([-4.0], [-4.5], 0.5),  # a step of one row
    ],
)
def test_the_baseline_by_hand(policy: list[float], reference: list[float], expected: float) -> None:
    state = {"kept": torch.ones(2)}
    values, after = KTO().prepare(step_of(policy, reference), state)
    assert values["baseline"].shape == ()
    assert values["baseline"].item() == pytest.approx(expected, abs=1e-6)
    assert after is state and KTO().init_state() == {}


def test_the_baseline_is_of_mismatched_completions_only() -> None:
    """Neither the rows' own completions nor their labels change it."""
    own = SequenceStats(torch.tensor([9.0, 9.0]), torch.tensor([1, 1]), torch.tensor([0.0, 0.0]), owner="kto")
    for label in ([True, True], [False, True]):
        step = step_of([-1.0, -2.0], [-2.0, -5.0], completion=own, label=torch.tensor(label))
        assert KTO().prepare(step, {})[0]["baseline"].item() == pytest.approx(2.0)


def test_without_a_baseline_nothing_is_asked_for() -> None:
    """No mismatched completions, no pass; and the loss reads nothing of the step."""
    bare, full = KTO(baseline="none"), KTO()
    assert (bare.needs_mismatched, bare.prepare_pass) == (False, False)
    assert (full.needs_mismatched, full.prepare_pass) == (True, True)
    assert bare.prepare(alignzoo.Step(rows=torch.arange(3)), {}) == ({}, {})
    batch = make_labelled(1)
    assert units(bare(dataclasses.replace(batch, step={}))) == units(bare(batch))
    assert units(bare(batch)) == units(full(at_zero(batch)))
    assert "baseline" not in bare(batch).metrics


def at_zero(batch: alignzoo.Labelled) -> alignzoo.Labelled:
    return dataclasses.replace(batch, step={"baseline": torch.zeros((), dtype=torch.float64)})


# --- what is logged ---------------------------------------------------------------------------------------------------


def test_what_is_logged_of_labelled_rows() -> None:
    """Rewards are beta times the log-ratio. Right is a desirable row above the baseline of 2 nats, another below it."""
    ratios, labels = [6.0, 1.0, 3.0, 1.0, 2.0], [True, True, False, False, False]
    batch = at(2.0, ratios, labels)
    found = logged(batch, KTO(beta=0.1)(batch))
    assert found["rewards/chosen"] == pytest.approx(0.35)
    assert found["rewards/rejected"] == pytest.approx(0.2)
    assert found["rewards/margins"] == pytest.approx(0.15)
    assert found["rewards/accuracies"] == pytest.approx((1 + 0 + 0 + 1 + 0.5) / 5)
    assert found["rewards/ties"] == pytest.approx(0.2)
    assert found["kl/chosen"] == pytest.approx(3.5)
    assert found["baseline"] == pytest.approx(2.0)


def test_without_a_threshold_the_sign_of_a_reward_decides() -> None:
    batch = at(2.0, [1.0, -1.0, 1.0, -1.0, 0.0], [True, True, False, False, False])
    found = logged(batch, KTO(beta=0.1, baseline="none")(batch))
    assert found["rewards/accuracies"] == pytest.approx((1 + 0 + 0 + 1 + 0.5) / 5)
    rewards = torch.tensor([3.0, -3.0, 3.0, -3.0, 0.0])
    bare = alignzoo.LossOutput(torch.zeros(5), rewards=rewards)
    assert logged(batch, bare)["rewards/accuracies"] == pytest.approx(0.5)
    of_each_row = dataclasses.replace(bare, threshold=torch.tensor([2.0, -4.0, 4.0, -4.0, 1.0]))
    assert logged(batch, of_each_row)["rewards/accuracies"] == pytest.approx((1 + 1 + 1 + 0 + 1) / 5)


def test_a_sum_of_terms_keeps_rewards_and_threshold_together() -> None:
    batch = at(2.0, [1.0, -1.0], [True, False])
    output, other = KTO(beta=0.1)(batch), alignzoo.LossOutput(torch.ones(2))
    for whole in (output + other, other + output, 2.0 * output):
        assert whole.threshold is output.threshold and whole.rewards is output.rewards


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"rewards": torch.zeros(2), "threshold": 0.5}, "detached tensor"),
        ({"rewards": torch.zeros(2), "threshold": torch.zeros(3)}, r"shape \(\) or \(2,\)"),
        ({"rewards": torch.zeros(2), "threshold": torch.zeros((), requires_grad=True)}, "detached"),
        ({"threshold": torch.zeros(2)}, "for the rewards of labelled rows"),
    ],
)
def test_a_threshold_that_does_not_fit_is_refused(output: dict[str, Any], message: str) -> None:
    batch = at(2.0, [1.0, -1.0], [True, False])
    with pytest.raises(alignzoo.AlignzooError, match=message):
        check_output(KTO(), batch, alignzoo.LossOutput(torch.zeros(2), **output))
    pairs = pairs_with_log_ratios([1.0, -1.0], [0.0, 0.0])
    both = alignzoo.LossOutput(torch.zeros(2), rewards=(torch.zeros(2),) * 2, threshold=torch.zeros(()))
    with pytest.raises(alignzoo.AlignzooError, match="for the rewards of labelled rows"):
        check_output(Hinge(), pairs, both)


@pytest.mark.parametrize(("label", "side", "other"), [(True, "chosen", "rejected"), (False, "rejected", "chosen")])
def test_rows_of_one_label_have_no_margin(label: bool, side: str, other: str) -> None:
    batch = at(0.0, [4.0, 2.0], [label, label])
    found = logged(batch, KTO(beta=0.1)(batch))
    assert found[f"rewards/{side}"] == pytest.approx(0.3)
    assert not {f"rewards/{other}", "rewards/margins", f"logps/{other}"} & found.keys()
    assert found["rewards/accuracies"] == float(label)


def test_the_margin_does_not_depend_on_the_micro_batches() -> None:
    """One micro-batch of one label only, one mixed: the difference of the means over all rows."""
    into = Accumulator()
    for ratios, labels in (([4.0, 2.0], [True, True]), ([9.0, -1.0], [True, False])):
        batch = at(0.0, ratios, labels)
        record(into, "kto", batch, KTO(beta=0.1)(batch))
    assert into.result()["rewards/margins"] == pytest.approx(0.5 - -0.1)
