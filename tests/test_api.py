"""The contract that losses are written against: log-probs, outputs, metrics, settings."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from loss_helpers import POISON, completion, random_completion, tokens, total

import alignzoo
from alignzoo.errors import PluginError

# --- log-probs --------------------------------------------------------------------------------------------------------


def test_sums_by_hand() -> None:
    """A log-prob of 0 is a certain token and counts; what is outside the mask does not."""
    part = completion([[-1.0, 0.0, -2.0], [-4.0]], [[-2.0, -1.0, 0.0], [-1.0]])
    assert (part.policy[~part.mask] == POISON).all() and (~part.mask).sum() == 4
    assert part.lengths.tolist() == [3, 1]
    assert part.sum().tolist() == [-3.0, -4.0]
    assert part.mean().tolist() == [-1.0, -4.0]
    assert part.log_ratio().tolist() == part.log_ratio("sum").tolist() == [0.0, -3.0]
    assert part.log_ratio("mean").tolist() == [0.0, -3.0]


def test_sums_equal_loops_over_tokens() -> None:
    part = random_completion(0, 7, 5)
    assert part.reference is not None
    policy, reference = tokens(part.policy, part.mask), tokens(part.reference, part.mask)
    assert part.sum().tolist() == pytest.approx([sum(row) for row in policy])
    assert part.mean().tolist() == pytest.approx([sum(row) / len(row) for row in policy])
    ratios = [[p - r for p, r in zip(ps, rs, strict=True)] for ps, rs in zip(policy, reference, strict=True)]
    assert part.log_ratio().tolist() == pytest.approx([sum(row) for row in ratios])
    assert part.log_ratio("mean").tolist() == pytest.approx([sum(row) / len(row) for row in ratios])


def test_a_mask_with_holes_and_a_late_start() -> None:
    """The mask alone says what counts: a completion need not start at 0 nor be of one piece."""
    values = torch.tensor([[5.0, -1.0, 5.0, -2.0], [5.0, 5.0, 5.0, -4.0]])
    part = alignzoo.LogProbs(policy=values, mask=values < 0, reference=torch.zeros(2, 4))
    assert part.sum().tolist() == [-3.0, -4.0]
    assert part.log_ratio("mean").tolist() == [-1.5, -4.0]


@pytest.mark.parametrize("poison", [1e30, -1e30, math.inf, math.nan])
@pytest.mark.parametrize("call", ["sum", "mean", "log_ratio"])
def test_values_outside_the_mask_never_matter(call: str, poison: float) -> None:
    part = random_completion(1, 4, 3)
    assert part.reference is not None
    policy = part.policy.masked_fill(~part.mask, poison).requires_grad_()
    changed = dataclasses.replace(part, policy=policy, reference=part.reference.masked_fill(~part.mask, poison))
    result = getattr(changed, call)()
    assert result.tolist() == getattr(part, call)().tolist()
    (gradient,) = torch.autograd.grad(result.sum(), policy)
    assert (gradient[~part.mask] == 0).all()
    expected = 1 / part.lengths.double() if call == "mean" else torch.ones(4, dtype=torch.float64)
    assert torch.equal(gradient, (expected[:, None] * part.mask))


def test_the_dtype_is_kept() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        part = random_completion(2, 2, 3, dtype=dtype)
        assert part.sum().dtype == part.mean().dtype == part.log_ratio("mean").dtype == dtype


def test_log_ratio_without_a_reference_names_the_loss() -> None:
    part = completion([[-1.0]], owner="orpo")
    with pytest.raises(PluginError, match=r'loss "orpo" asked for log_ratio\(\)') as caught:
        part.log_ratio()
    assert "needs_reference = True" in caught.value.fix
    with pytest.raises(PluginError, match="orpo"):
        part.log_ratio("mean")


def test_log_ratio_knows_two_reductions() -> None:
    with pytest.raises(ValueError, match='"sum" or "mean"'):
        completion([[-1.0]], [[-1.0]]).log_ratio("max")  # type: ignore[arg-type]


def test_sequence_stats_say_the_same_as_log_probs() -> None:
    part = random_completion(3, 4, 3)
    assert part.reference is not None
    reference = part.reference.masked_fill(~part.mask, 0).sum(-1)
    stats = alignzoo.SequenceStats(policy=part.sum(), lengths=part.lengths, reference=reference)
    assert stats.sum().tolist() == part.sum().tolist()
    assert stats.mean().tolist() == part.mean().tolist()
    assert stats.log_ratio("mean").tolist() == pytest.approx(part.log_ratio("mean").tolist())
    with pytest.raises(PluginError, match="kto"):
        dataclasses.replace(stats, reference=None, owner="kto").log_ratio()


def test_batches_are_frozen() -> None:
    batch = alignzoo.Demonstrations(completion=completion([[-1.0]]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.completion = completion([[-2.0]])  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.completion.policy = torch.zeros(1, 1)  # type: ignore[misc]


# --- outputs ----------------------------------------------------------------------------------------------------------


def per_example(*values: float, **options: Any) -> alignzoo.LossOutput:
    return alignzoo.LossOutput(torch.tensor(values), **options)


def test_each_term_is_divided_by_its_own_units() -> None:
    """3 examples with mean 2, of which a mask leaves 2 with mean 1.5, and 4 tokens with mean 10."""
    example = per_example(1.0, 2.0, 3.0)
    masked = per_example(1.0, 2.0, 99.0, mask=torch.tensor([True, True, False]))
    token_mask = torch.tensor([[True, True], [True, False], [True, False]])
    token = alignzoo.LossOutput(torch.tensor([[4.0, 6.0], [10.0, 99.0], [20.0, 99.0]]), per="token", mask=token_mask)
    assert total(example + masked).item() == 3.5
    assert total(example + 0.5 * token).item() == 2 + 5
    assert total(2.0 * (example + token) + masked * 3).item() == 2 * (2 + 10) + 4.5
    assert [term.per for term in (example + token + masked).terms] == ["example", "token", "example"]


def test_arithmetic_leaves_its_operands_alone() -> None:
    first, second = per_example(1.0), per_example(10.0)
    _ = 3 * (first + second)
    assert total(first).item() == 1.0 and len(first.terms) == 1


def test_a_factor_scales_the_gradient_and_not_the_metrics() -> None:
    values = torch.tensor([1.0, 3.0], requires_grad=True)
    output = 4.0 * alignzoo.LossOutput(values, metrics={"m": values.detach()})
    total(output).backward()
    assert values.grad is not None and values.grad.tolist() == [2.0, 2.0]
    logged = output.metrics["m"]
    assert isinstance(logged, torch.Tensor) and logged.tolist() == [1.0, 3.0]


def test_a_sum_keeps_metrics_and_rewards_of_both() -> None:
    one = torch.ones(1)
    combined = per_example(1.0, metrics={"a": one}) + per_example(2.0, metrics={"b": one}, rewards=one)
    assert sorted(combined.metrics) == ["a", "b"]
    assert combined.rewards is one
    assert (per_example(1.0, rewards=one) + per_example(2.0)).rewards is one


def test_a_metric_logged_twice_is_refused() -> None:
    one = torch.ones(1)
    with pytest.raises(PluginError, match="the same metric: margin"):
        per_example(1.0, metrics={"margin": one, "a": one}) + per_example(2.0, metrics={"margin": one})
    with pytest.raises(PluginError, match="carry rewards"):
        per_example(1.0, rewards=one) + per_example(2.0, rewards=(one, one))


@pytest.mark.parametrize("other", ["2", None, [2.0]])
def test_only_numbers_and_outputs_combine(other: Any) -> None:
    with pytest.raises(TypeError):
        per_example(1.0) * other
    with pytest.raises(TypeError):
        per_example(1.0) + other


def test_a_metric_has_the_shape_of_its_condition() -> None:
    values = torch.arange(3.0)
    kept = alignzoo.metric(values, where=values > 0, reduce="max")
    assert kept.reduce == "max" and kept.where is not None and kept.where.tolist() == [False, True, True]
    assert alignzoo.metric(values).reduce == "mean"
    with pytest.raises(ValueError, match=r"shape \(3,\) and where \(2,\)"):
        alignzoo.metric(values, where=torch.tensor([True, False]))
    with pytest.raises(ValueError, match='"mean", "min" or "max"'):
        alignzoo.metric(values, reduce="sum")  # type: ignore[arg-type]


def test_a_scalar_metric_is_refused() -> None:
    """A mean of the means of micro-batches depends on how they were cut."""
    with pytest.raises(ValueError, match="one value per row"):
        alignzoo.metric(torch.tensor(1.0))


# --- settings and losses ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    beta: float = alignzoo.setting(0.1, "a number", gt=0, le=1)
    steps: int = alignzoo.setting(3, "a whole number", ge=1)
    kind: str = alignzoo.setting("a", "a choice", choices=("a", "b"))
    weights: tuple[float, ...] = alignzoo.setting((1.0,), "numbers", ge=0)
    floor: float | None = alignzoo.setting(None, "a number or nothing", lt=0)


class Plain(alignzoo.Loss):
    name, data, needs_reference = "plain", "demonstrations", False
    Settings = Settings

    def __call__(self, batch: alignzoo.Demonstrations) -> alignzoo.LossOutput:
        return alignzoo.LossOutput(-batch.completion.sum())


def test_a_loss_is_built_from_settings_or_from_their_names() -> None:
    assert Plain().settings == Settings()
    assert Plain(beta=0.5, weights=(0.0, 2.0)).settings == Plain(Settings(beta=0.5, weights=(0.0, 2.0))).settings
    assert Plain(beta=1).settings.beta == 1  # a whole number is a number
    assert Plain(floor=-1.0).settings.floor == -1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": 0.0}, r"beta = 0.0 is out of range \(allowed: > 0 and <= 1\)"),
        ({"beta": 1.5}, "beta = 1.5 is out of range"),
        ({"beta": math.nan}, "beta = nan: is not a finite number"),
        ({"beta": math.inf}, "beta = inf: is not a finite number"),
        ({"beta": "0.1"}, 'beta = "0.1": has the wrong type'),
        ({"beta": True}, "beta = true: has the wrong type"),
        ({"beta": None}, "beta = None: has the wrong type"),
        ({"steps": 0}, "steps = 0 is out of range"),
        ({"steps": 2.0}, "steps = 2.0: has the wrong type"),
        ({"kind": "c"}, "kind = \"c\" is out of range .* one of 'a', 'b'"),
        ({"weights": (1.0, -1.0)}, "weights = .* is out of range"),
        ({"weights": (1.0, math.nan)}, "element 1"),
        ({"weights": 1.0}, "is not a list"),
        ({"floor": 0.0}, "floor = 0.0 is out of range"),
        ({"betta": 0.1}, "betta"),
    ],
)
def test_bounds_and_types_hold_in_python(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=message) as caught:
        Plain(**values)
    assert 'loss "plain"' in str(caught.value)
    if "betta" not in values:  # a Settings that was built by hand is checked as well
        with pytest.raises(PluginError, match=message):
            Plain(Settings(**values))


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(PluginError, match=r"beta = -1.0.*steps = 0"):
        Plain(beta=-1.0, steps=0)


def test_settings_of_another_loss_are_refused() -> None:
    with pytest.raises(PluginError, match='loss "plain": settings are a NoSettings, not its Settings'):
        Plain(alignzoo.NoSettings())
    with pytest.raises(TypeError, match="not both"):
        Plain(Settings(), beta=0.2)


def test_a_setting_needs_a_help_text() -> None:
    with pytest.raises(ValueError, match="help text"):
        alignzoo.setting(0.1, " ")


def test_the_defaults_of_a_loss_are_those_that_are_documented() -> None:
    assert alignzoo.Loss.contract == 1  # of a class that says nothing, also when later contracts exist
    assert (alignzoo.Loss.paper, alignzoo.Loss.family) == ("", "")
    assert (alignzoo.Loss.token_stats, alignzoo.Loss.invariances) == (frozenset(), frozenset())
    assert (alignzoo.Loss.needs_mismatched, alignzoo.Loss.prepare_pass) == (False, True)
    assert Plain().init_state() == {} and not Plain().has_prepare
    for name in ("name", "data", "Settings", "needs_reference"):
        assert name not in vars(alignzoo.Loss)


def test_a_loss_with_prepare_says_so() -> None:
    class Prepared(Plain):
        def prepare(self, step: alignzoo.Step, state: dict[str, torch.Tensor]) -> Any:
            return {}, state

    assert Prepared().has_prepare
