"""GRPO: advantages and each aggregation against closed forms, the plain policy gradient, TRL's own loss, edge cases."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alignzoo_losses.grpo import GRPO, advantages_of
from conftest import make_trees
from loss_helpers import POISON, gradcheck_loss, gradients, random_completion, tokens, total, units
from test_engine import error, update_of

import alignzoo
from alignzoo.metrics import Accumulator, record
from alignzoo.objective import check_output
from alignzoo.tree import Tree

NONE = math.nan
REWARDS = [1.0, 0.0, 0.5, 2.0, 2.0, -1.0, 3.0]
GROUP = [0, 0, 0, 1, 1, 1, 1]


def groups(
    loss: GRPO,
    seed: int = 0,
    rewards: Sequence[float] = REWARDS,
    group: Sequence[int] = GROUP,
    truncated: Sequence[int] = (),
    **options: Any,
) -> alignzoo.Groups:
    """A batch that is the whole step: ragged completions with old and sampler log-probs, advantages prepared."""
    part = random_completion(seed, len(rewards), 6, **options)
    generator = torch.Generator().manual_seed(seed + 1)

    def near(scale: float) -> torch.Tensor:
        noise = torch.randn(part.policy.shape, generator=generator, dtype=torch.float64) * scale
        return (part.policy.detach() + noise.to(part.policy.dtype)).masked_fill(~part.mask, -POISON)

    given = {
        "rewards": torch.tensor(rewards, dtype=part.policy.dtype),
        "group": torch.tensor(group),
        "truncated": torch.tensor([i in truncated for i in range(len(rewards))]),
    }
    step, _ = loss.prepare(alignzoo.Step(rows=torch.arange(max(group) + 1), **given), {})
    return alignzoo.Groups(completion=part, step=step, old=near(0.3), sampler=near(0.3), **given)


def logged(batch: alignzoo.Groups, loss: GRPO) -> dict[str, float]:
    into, output = Accumulator(), loss(batch)
    check_output(loss, batch, output)
    record(into, "grpo", batch, output)
    return into.result()


# --- advantages -------------------------------------------------------------------------------------------------------


def advantages_by_hand(rewards: Sequence[float], group: Sequence[int], baseline: str, scale: str) -> list[float]:
    """Group by group, with loops; a reward of None is nobody's neighbour."""
    everyone = [r for r in rewards if not math.isnan(r)]
    found = []
    for i, (reward, mine) in enumerate(zip(rewards, group, strict=True)):
        if math.isnan(reward):
            found.append(0.0)
            continue
        peers = [r for r, g in zip(rewards, group, strict=True) if g == mine and not math.isnan(r)]
        others = [
            r for j, (r, g) in enumerate(zip(rewards, group, strict=True)) if g == mine and j != i and not math.isnan(r)
        ]
        against = {"group": peers, "leave_one_out": others or [reward], "batch": everyone}[baseline]
        divisor = {"group": deviation(peers) + 1e-4, "batch": deviation(everyone) + 1e-4, "none": 1.0}[scale]
        found.append((reward - sum(against) / len(against)) / divisor)
    return found


def deviation(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0


@pytest.mark.parametrize("baseline", ["group", "leave_one_out", "batch"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize(
    ("rewards", "group"),
    [
        (REWARDS, GROUP),
        ([1.0, NONE, 0.5, 2.0, NONE, NONE, 3.0], GROUP),
        ([5.0, 0.25, 0.25, 0.25], [0, 1, 1, 1]),
        ([4.0], [0]),
        ([NONE, NONE], [0, 0]),
        ([0.0, 1.0, 1.0, 0.0], [1, 0, 1, 0]),
    ],
)
def test_advantages_by_hand(rewards: list[float], group: list[int], baseline: str, scale: str) -> None:
    found, _ = advantages_of(torch.tensor(rewards), torch.tensor(group), baseline, scale)
    assert found.tolist() == pytest.approx(advantages_by_hand(rewards, group, baseline, scale), rel=1e-5, abs=1e-6)


def test_leave_one_out_is_the_reward_less_the_mean_of_the_others() -> None:
    found, _ = advantages_of(torch.tensor([6.0, 0.0, 3.0]), torch.zeros(3, dtype=torch.long), "leave_one_out", "none")
    assert found.tolist() == pytest.approx([4.5, -4.5, 0.0])


def test_equal_rewards_have_no_advantage_to_the_last_bit() -> None:
    """0.1 has no exact float32, and a mean that is off by rounding would be divided by 1e-4."""
    found, flat = advantages_of(torch.full((7,), 0.1), torch.zeros(7, dtype=torch.long), "group", "group")
    assert found.tolist() == [0.0] * 7 and flat.all()


def test_groups_without_spread_are_counted() -> None:
    """Of 7 completions the 3 of one group and the 1 with a single reward: 5, with the one beside it that has none."""
    rewards, group = [2.0, 2.0, 2.0, 1.0, 0.0, 7.0, NONE], [0, 0, 0, 1, 1, 2, 2]
    found = logged(groups(GRPO(), rewards=rewards, group=group), GRPO())
    assert found["frac_reward_zero_std"] == pytest.approx(5 / 7)
    assert found["frac_masked"] == pytest.approx(1 / 7)


# --- the loss ---------------------------------------------------------------------------------------------------------


def loss_by_hand(batch: alignzoo.Groups, s: Any) -> float:
    """The loss of a whole step, token after token, from the definitions."""
    part = batch.completion
    policy, old, sampler = (tokens(x, part.mask) for x in (part.policy, batch.old, batch.sampler))
    reference = tokens(part.reference, part.mask)
    advantages = advantages_by_hand(batch.rewards.tolist(), batch.group.tolist(), s.baseline, s.advantage_scale)
    high = 1 + (s.epsilon if s.epsilon_high is None else s.epsilon_high)
    rows = []
    for i, length in enumerate(part.lengths.tolist()):
        if math.isnan(batch.rewards[i]) or (s.mask_truncated and batch.truncated[i]):
            continue
        gaps = [p - o for p, o in zip(policy[i], old[i], strict=True)]
        drift = [o - q for o, q in zip(old[i], sampler[i], strict=True)]
        row = []
        for t in range(length):
            w = math.exp(gaps[t] if s.importance == "token" else sum(gaps) / length)
            if s.surrogate == "cispo":
                gain = min(w, high) * advantages[i] * policy[i][t]
            else:
                gain = min(w * advantages[i], min(max(w, 1 - s.epsilon), high) * advantages[i])
            c = {"none": 1.0, "token": math.exp(drift[t]), "sequence": math.exp(sum(drift))}[s.sampler_correction]
            if c > s.sampler_cap:
                c = s.sampler_cap if s.sampler_excess == "truncate" else 0.0
            x = math.exp(reference[i][t] - policy[i][t])
            row.append(-gain * c + s.beta * (x - math.log(x) - 1))
        rows.append(row)
    if s.aggregation == "token":
        return sum(map(sum, rows)) / sum(map(len, rows))
    return sum(sum(row) / (len(row) if s.aggregation == "sequence" else s.constant_length) for row in rows) / len(rows)


CASES: dict[str, dict[str, Any]] = {
    "grpo": {"beta": 0.04},
    "dapo": {"aggregation": "token", "epsilon_high": 0.28, "mask_truncated": True},
    "dr grpo": {"aggregation": "constant", "constant_length": 9, "advantage_scale": "none"},
    "gspo": {"importance": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "gspo wide": {"importance": "sequence", "aggregation": "token", "beta": 0.3},
    "cispo": {"surrogate": "cispo", "epsilon_high": 0.1, "aggregation": "token"},
    "rloo": {"baseline": "leave_one_out", "advantage_scale": "none", "aggregation": "constant", "constant_length": 1},
    "reinforce++": {"baseline": "batch", "advantage_scale": "batch", "aggregation": "token"},
    "corrected by token": {"sampler_correction": "token", "sampler_cap": 1.2, "beta": 0.1},
    "corrected by completion": {"sampler_correction": "sequence", "sampler_cap": 1.5, "sampler_excess": "mask"},
    "masked by token": {"sampler_correction": "token", "sampler_cap": 1.1, "sampler_excess": "mask"},
}
every_case = pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())


@every_case
@pytest.mark.parametrize("rewards", [REWARDS, [1.0, NONE, 0.5, 2.0, NONE, -1.0, 3.0]], ids=["all", "some None"])
def test_equals_the_closed_form(settings: dict[str, Any], rewards: list[float]) -> None:
    loss = GRPO(**settings)
    for seed in (0, 1, 2):
        batch = groups(loss, seed, rewards, truncated=(2, 6))
        assert total(loss(batch)).item() == pytest.approx(loss_by_hand(batch, loss.settings), rel=1e-9)


@every_case
def test_the_gradient_is_that_of_the_loss(settings: dict[str, Any]) -> None:
    loss = GRPO(**settings)
    if loss.settings.surrogate == "cispo":
        batch = groups(loss, requires_grad=True)
        found = gradients(loss, batch)["completion"]
        ratio = (batch.completion.policy.detach() - batch.old).exp().clamp(max=1.1)
        expected = (-ratio * batch.step["advantages"][:, None] / batch.completion.mask.sum()).masked_fill(
            ~batch.completion.mask, 0.0
        )
        assert torch.allclose(found, expected, rtol=1e-10)
    else:
        gradcheck_loss(loss, groups(loss, 3))


@every_case
def test_what_lies_outside_the_mask_changes_nothing(settings: dict[str, Any]) -> None:
    loss = GRPO(**settings)
    batch = groups(loss, requires_grad=True)
    part = batch.completion
    assert (gradients(loss, batch)["completion"][~part.mask] == 0).all()

    def spoilt(values: torch.Tensor, by: float) -> torch.Tensor:
        return values.detach().masked_fill(~part.mask, by)

    other = dataclasses.replace(part, policy=spoilt(part.policy, 1e30), reference=spoilt(part.reference, -1e30))
    changed = dataclasses.replace(
        batch, completion=other, old=spoilt(batch.old, -1e30), sampler=spoilt(batch.sampler, 1e30)
    )
    assert units(loss(changed)) == units(loss(batch))
    assert logged(changed, loss) == logged(batch, loss)


AGGREGATIONS = [
    {"aggregation": "sequence"},
    {"aggregation": "token"},
    {"aggregation": "constant", "constant_length": 8},
]


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("surrogate", ["clipped", "cispo"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=["sequence", "token", "constant"])
def test_at_ratio_one_it_is_the_plain_policy_gradient(
    aggregation: dict[str, Any], surrogate: str, importance: str
) -> None:
    """Without `old` the gradient is that of - A log pi, each token weighed by its aggregation."""
    loss = GRPO(surrogate=surrogate, importance=importance, **aggregation)
    batch = dataclasses.replace(groups(loss, requires_grad=True), old=None)
    found = gradients(loss, batch)["completion"]
    part, advantages = batch.completion, batch.step["advantages"]
    weights = {
        "sequence": 1 / (7 * part.lengths),
        "token": torch.ones(7) / part.mask.sum(),
        "constant": torch.ones(7) / (7 * 8),
    }[aggregation["aggregation"]]
    expected = (-advantages * weights)[:, None].expand_as(part.policy).masked_fill(~part.mask, 0.0)
    assert torch.allclose(found, expected, rtol=1e-12)


def test_rloo_is_reinforce_with_leave_one_out() -> None:
    """The gradient of - mean_i A_i log pi(y_i), A_i the reward less the mean of the others."""
    loss = GRPO(**CASES["rloo"])
    batch = dataclasses.replace(groups(loss, requires_grad=True), old=None)
    advantages = torch.tensor(advantages_by_hand(REWARDS, GROUP, "leave_one_out", "none"), dtype=torch.float64)
    objective = -(advantages * batch.completion.sum()).mean()
    (expected,) = torch.autograd.grad(objective, batch.completion.policy)
    assert torch.allclose(gradients(loss, batch)["completion"], expected, rtol=1e-6)


def test_a_clipped_token_has_no_gradient_and_a_cispo_token_has() -> None:
    """Ratios e and 1/e, advantages +1 and -1: above the upper and below the lower bound."""
    part = alignzoo.LogProbs(
        policy=torch.tensor([[-1.0], [-2.0]], requires_grad=True), mask=torch.ones(2, 1, dtype=torch.bool)
    )
    batch = alignzoo.Groups(
        completion=part, rewards=torch.zeros(2), group=torch.zeros(2, dtype=torch.long),
        old=torch.tensor([[-2.0], [-1.0]]), truncated=torch.zeros(2, dtype=torch.bool),
        step={"advantages": torch.tensor([1.0, -1.0]), "flat": torch.zeros(2, dtype=torch.bool)},
    )  # fmt: skip
    assert units(GRPO(epsilon=0.2, epsilon_high=0.3)(batch)) == pytest.approx([-1.3, 0.8])
    assert gradients(GRPO(), batch)["completion"].tolist() == [[0.0], [0.0]]
    cispo = gradients(GRPO(surrogate="cispo", epsilon_high=0.5), batch)["completion"]
    assert cispo.flatten().tolist() == pytest.approx([-0.75, math.exp(-1) / 2])
    found = logged(batch, GRPO())
    assert [found[f"clip_ratio/{name}"] for name in ("low", "high", "region")] == [0.5, 0.5, 1.0]


def test_advantages_of_the_batch_go_first() -> None:
    loss = GRPO(aggregation="token")
    batch = dataclasses.replace(groups(loss, requires_grad=True), old=None)
    by_token = torch.arange(batch.completion.mask.numel(), dtype=torch.float64).view(batch.completion.mask.shape)
    found = gradients(loss, dataclasses.replace(batch, advantages=by_token))["completion"]
    assert torch.allclose(found, -by_token.masked_fill(~batch.completion.mask, 0.0) / batch.completion.mask.sum())


# --- edge cases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=["sequence", "token", "constant"])
def test_edge_cases_have_no_gradient_and_stay_finite(aggregation: dict[str, Any]) -> None:
    """One completion; equal rewards; no reward at all; all of them truncated."""
    loss = GRPO(mask_truncated=True, **aggregation)
    for rewards, truncated, counted in (
        ([3.0], (), 1),
        ([0.7] * 4, (), 4),
        ([NONE] * 3, (), 0),
        ([1.0, 2.0], (0, 1), 0),
    ):
        batch = groups(loss, rewards=rewards, group=[0] * len(rewards), truncated=truncated, requires_grad=True)
        output = loss(batch)
        mask = output.terms[0].mask
        assert mask is not None
        expected = int(batch.completion.lengths[:counted].sum()) if aggregation["aggregation"] == "token" else counted
        assert int(mask.sum()) == expected
        value = output.loss.masked_fill(~mask, 0.0).sum()
        (gradient,) = torch.autograd.grad(value, batch.completion.policy)
        assert value.item() == 0.0 and (gradient == 0).all()
        assert all(math.isfinite(v) for v in logged(batch, loss).values())


def test_truncated_completions_shrink_the_units_and_stay_in_the_mean() -> None:
    loss, every = GRPO(mask_truncated=True, aggregation="token"), GRPO(aggregation="token")
    batch = groups(loss, truncated=(0, 6))
    lengths = batch.completion.lengths.tolist()
    assert len(units(every(batch))) == sum(lengths)
    assert len(units(loss(batch))) == sum(lengths) - lengths[0] - lengths[6]
    assert torch.equal(batch.step["advantages"], groups(every).step["advantages"])
    assert logged(batch, loss)["frac_masked"] == pytest.approx(2 / 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aggregation": "constant"}, "go together"),
        ({"constant_length": 100}, "go together"),
        ({"beta": -0.1}, "beta = -0.1 is out of range"),
        ({"epsilon": 0.0}, "epsilon = 0.0"),
        ({"aggregation": "tokens"}, "wanted: one of"),
    ],
)
def test_settings_have_bounds(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((alignzoo.AlignzooError, ValueError), match=message):
        GRPO(**settings)


# --- what is logged ---------------------------------------------------------------------------------------------------


def test_the_distance_of_sampler_and_trainer_is_logged() -> None:
    loss = GRPO(sampler_correction="token", sampler_cap=1.2)
    batch = groups(loss)
    found = logged(batch, loss)
    old, sampler = (tokens(x, batch.completion.mask) for x in (batch.old, batch.sampler))
    gaps = [q - o for os, qs in zip(old, sampler, strict=True) for o, q in zip(os, qs, strict=True)]
    assert found["sampler/kl"] == pytest.approx(sum(gaps) / len(gaps))
    assert found["sampler/logp_difference"] == pytest.approx(sum(map(abs, gaps)) / len(gaps))
    assert found["sampler/logp_difference_max"] == pytest.approx(max(map(abs, gaps)))
    assert found["sampler/weight"] == pytest.approx(sum(min(math.exp(-g), 1.2) for g in gaps) / len(gaps))
    assert found["sampler/capped"] == pytest.approx(sum(math.exp(-g) > 1.2 for g in gaps) / len(gaps))
    assert not any(name.startswith("sampler/") for name in logged(dataclasses.replace(batch, sampler=None), loss))


def test_entropy_and_kl_are_means_over_the_tokens_that_count() -> None:
    loss = GRPO(beta=0.1)
    batch = groups(loss, rewards=[NONE, *REWARDS[1:]])
    mask = batch.completion.mask
    entropy = torch.rand(mask.shape, dtype=torch.float64)
    found = logged(dataclasses.replace(batch, completion=dataclasses.replace(batch.completion, entropy=entropy)), loss)
    assert found["entropy"] == pytest.approx(entropy[1:][mask[1:]].mean().item())
    gap = (batch.completion.reference - batch.completion.policy)[1:][mask[1:]]
    assert found["kl"] == pytest.approx((gap.exp() - gap - 1).mean().item())


# --- against TRL ------------------------------------------------------------------------------------------------------


def trl_loss(kind: str, batch: alignzoo.Groups, **settings: Any) -> tuple[torch.Tensor, dict[str, float]]:
    """GRPOTrainer._compute_loss of TRL 1.16 on these tensors, and what it logs."""
    trl = pytest.importorskip("trl")
    if not trl.__version__.startswith("1.16."):
        pytest.skip(f"written for TRL 1.16, a private method of it; this is {trl.__version__}")
    from trl import GRPOTrainer

    part = batch.completion
    mask = part.mask.to(part.policy.dtype)
    zeros = torch.zeros(part.policy.shape, dtype=torch.long)
    args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    this = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            part.policy.masked_fill(~part.mask, 0.0), torch.ones_like(mask), None
        ),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x),
        model=SimpleNamespace(training=True), args=args, _metrics=defaultdict(lambda: defaultdict(list)),
        current_gradient_accumulation_steps=1, loss_type=kind, aux_loss_enabled=False, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, _entropy_bonus_enabled=False,
        **{"beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2, "importance_sampling_level": "token",
           "max_completion_length": 9, "use_vllm": False, "vllm_importance_sampling_correction": False, **settings},
    )  # fmt: skip
    inputs = {
        "prompt_ids": zeros[:, :1], "prompt_mask": zeros[:, :1], "completion_ids": zeros, "completion_mask": mask,
        "advantages": batch.step["advantages"], "num_items_in_batch": mask.sum(),
        "old_per_token_logps": batch.old.masked_fill(~part.mask, 0.0),
        "ref_per_token_logps": part.reference.masked_fill(~part.mask, 0.0),
    }  # fmt: skip
    if settings.get("use_vllm"):
        gap = (batch.old - batch.sampler).masked_fill(~part.mask, 0.0)
        inputs["importance_sampling_ratio"] = gap.exp().clamp(max=3.0)
    loss = GRPOTrainer._compute_loss(this, None, inputs)
    return loss, {name: values[-1] for name, values in this._metrics["train"].items()}


@pytest.mark.parametrize(
    ("kind", "theirs", "ours"),
    [
        ("grpo", {"beta": 0.04}, {"beta": 0.04}),
        ("grpo", {"importance_sampling_level": "sequence", "epsilon_high": 0.05},
         {"importance": "sequence", "epsilon_high": 0.05}),
        ("dapo", {"epsilon_high": 0.28, "beta": 0.1}, {"aggregation": "token", "epsilon_high": 0.28, "beta": 0.1}),
        ("dr_grpo", {}, {"aggregation": "constant", "constant_length": 9, "advantage_scale": "none"}),
        ("cispo", {"epsilon_high": 1.5}, {"surrogate": "cispo", "aggregation": "token", "epsilon_high": 0.5}),
        ("dapo", {"use_vllm": True, "vllm_importance_sampling_correction": True},
         {"aggregation": "token", "sampler_correction": "token", "sampler_cap": 3.0}),
    ],
)  # fmt: skip
def test_equals_trls_loss_gradient_and_shares(kind: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    loss = GRPO(**ours)
    for seed in (0, 5):
        batch = groups(loss, seed, requires_grad=True)
        expected, shares = trl_loss(kind, batch, **theirs)
        (gradient,) = torch.autograd.grad(expected, batch.completion.policy)
        assert total(loss(batch)).item() == pytest.approx(expected.item(), rel=1e-10)
        assert torch.allclose(gradients(loss, batch)["completion"], gradient, rtol=1e-9)
        found = logged(batch, loss)
        names = {"kl": "kl"} | {f"clip_ratio/{n}": f"clip_ratio/{n}_mean" for n in ("low", "high", "region")}
        names |= {"clip_ratio/high": "cispo_clip_ratio"} if kind == "cispo" else {}
        for name, other in names.items():
            assert other not in shares or found[name] == pytest.approx(shares[other]), name


# --- through the engine -----------------------------------------------------------------------------------------------


def group_trees() -> list[Tree]:
    """Prompts with 3 completions each, of unlike lengths and rewards; one has no reward, one is truncated."""
    trees = make_trees(5, 3, 3)
    rewards = [[1.0, 0.0, 0.5], [0.2, 0.2, 0.2], [3.0, NONE, 1.0], [0.0, -2.0, 1.0], [1.0, 1.0, 0.0]]
    return [
        dataclasses.replace(t, rewards=tuple(r), truncated=(False, False, t.row == 3))
        for t, r in zip(trees, rewards, strict=True)
    ]


@pytest.mark.parametrize("settings", [CASES["grpo"], CASES["dapo"], CASES["dr grpo"]], ids=["grpo", "dapo", "dr grpo"])
def test_a_step_does_not_depend_on_the_micro_batches(settings: dict[str, Any]) -> None:
    loss, trees = GRPO(**settings), group_trees()
    whole, metrics = update_of(loss, trees, engine__tokens_per_device=100_000, train__learning_rate=1.0)
    assert whole.norm() > 0.01 and metrics["entropy"] > 0
    assert metrics["frac_reward_zero_std"] == pytest.approx(0.2)
    for budget in (1, 60):
        update, again = update_of(loss, trees, engine__tokens_per_device=budget, train__learning_rate=1.0)
        assert error(update, whole) < 1e-5
        for name in ("loss", "entropy", "frac_masked", "clip_ratio/region"):
            assert again[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name
