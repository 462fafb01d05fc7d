"""Group relative policy optimisation of Shao et al. 2024 (DeepSeekMath, arXiv:2402.03300, equations 3 and 4).

    A_i = (R_i - mean of its group) / (std of its group + 1e-4)          w_it = pi(y_it) / pi_old(y_it)
    l_it = - min(w_it A_i, clip(w_it, 1 - eps, 1 + eps_high) A_i) + beta (ref/pi - log(ref/pi) - 1)(y_it)
    L = mean_i (1 / |y_i|) sum_t l_it

pi_old made the rollout; where its log-probs are not given it is the policy itself, and w is 1 with a gradient. std has
Bessel's correction and 1e-4 beside it as in TRL; the paper has neither. Here beta is 0 (0.04 in the paper): without it
there is no reference.

Reduction: by `aggregation`, over the completions that count:
- sequence: a mean over tokens, then over completions: the paper's.
- token: over all tokens of the step (DAPO, Yu et al. 2025, arXiv:2503.14476, equation 8; eps_high is 0.28 there).
- constant: the sum over a completion's tokens divided by `constant_length`, then over completions (Dr. GRPO, Liu et al.
  2025, arXiv:2503.20783, with the longest completion allowed, and advantage_scale "none").
What else is a setting, since it changes one factor and nothing around it:
- baseline: the mean of the group; that of the others in it (RLOO, Ahmadian et al. 2024, arXiv:2402.14740); or that of
  the step (REINFORCE++, Hu 2025, arXiv:2501.03262). Both of these papers put the KL penalty into the reward: here it is
  a term of the loss. RLOO as published sums over tokens: aggregation "constant" with constant_length 1. Its ratio would
  be the product over a completion, here it is that of a token or the next one; at ratio 1 the gradients are the same.
- advantage_scale: the std of the group, of all rewards of the step (Liu et al. 2025, arXiv:2508.08221), or 1.
- importance: sequence has one w for a completion, the geometric mean over its tokens (GSPO, Zheng et al. 2025,
  arXiv:2507.18071, equations 5 to 7; eps is of the order of 3e-4 there).
- surrogate: cispo has - sg(min(w, 1 + eps_high)) A log pi, by which every token keeps a gradient (MiniMax-M1, 2025,
  arXiv:2506.13585, equations 4 and 5, without a lower bound as there). TRL's epsilon_high for it is the cap itself: 1
  more than here.
- sampler_correction: l_it, without the KL term, times c = pi_old / pi_sampler of the token or the completion, cut at
  `sampler_cap` (truncated importance sampling, Yao et al. 2025, "Your efficient RL framework secretly brings you
  off-policy RL training"), or 0 beyond it with sampler_excess "mask". Without log-probs of the sampler c is 1.

Groups: advantages are of whole groups, computed once for the step. A reward of NaN is none: such a completion has no
part in mean and std, and is left out of the units, as truncated ones are with mask_truncated (DAPO's filter; their
rewards stay in mean and std). A group of one, or of equal rewards, has advantage 0; its completions stay in the units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import alignzoo

if TYPE_CHECKING:
    from torch import Tensor

SCALE_FLOOR = 1e-4  # beside a std, as in TRL


@dataclass(frozen=True)
class Settings:
    beta: float = alignzoo.setting(0.0, "weight of the KL term; 0 needs no reference", ge=0)
    epsilon: float = alignzoo.setting(0.2, "how far a ratio may fall below 1 and still be learned from", gt=0)
    epsilon_high: float | None = alignzoo.setting(None, "how far it may rise above 1; not set: as epsilon", gt=0)
    aggregation: Literal["sequence", "token", "constant"] = alignzoo.setting(
        "sequence", "what counts the same: every completion, every token, or tokens over constant_length"
    )
    constant_length: int | None = alignzoo.setting(None, 'divisor of aggregation "constant", in tokens', ge=1)
    baseline: Literal["group", "leave_one_out", "batch"] = alignzoo.setting(
        "group", "the mean reward that a reward is compared with: of its group, of the others in it, of the step"
    )
    advantage_scale: Literal["group", "batch", "none"] = alignzoo.setting(
        "group", "the std that advantages are divided by: of the group's rewards, of the step's, or none"
    )
    importance: Literal["token", "sequence"] = alignzoo.setting("token", "one ratio for each token or completion")
    surrogate: Literal["clipped", "cispo"] = alignzoo.setting("clipped", "clip the ratio, or cap a detached weight")
    mask_truncated: bool = alignzoo.setting(False, "leave completions out that were cut off at the length limit")
    sampler_correction: Literal["none", "token", "sequence"] = alignzoo.setting(
        "none", "correct for a sampler whose log-probs differ from the trainer's, by token or by completion"
    )
    sampler_cap: float = alignzoo.setting(2.0, "largest weight of that correction", gt=0)
    sampler_excess: Literal["truncate", "mask"] = alignzoo.setting("truncate", "above the cap: the cap, or no weight")

    def __post_init__(self) -> None:
        if (self.aggregation == "constant") != (self.constant_length is not None):
            raise ValueError('aggregation = "constant" and constant_length go together: give both or neither')


class GRPO(alignzoo.Loss):
    name, data = "grpo", "groups"
    Settings = Settings
    family = "policy gradient"
    paper = "Shao et al. 2024, arXiv:2402.03300, equations 3 and 4"
    invariances = frozenset({"prompt_length", "reward_shift", "token_order"})
    token_stats = frozenset({"entropy"})  # an exponential per logit, beside H multiplications for it
    prepare_pass = False

    @property
    def needs_reference(self) -> bool:
        return bool(self.settings.beta > 0)

    def prepare(self, step: alignzoo.Step, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        assert step.rewards is not None and step.group is not None
        advantages, flat = advantages_of(
            step.rewards, step.group, self.settings.baseline, self.settings.advantage_scale
        )
        return {"advantages": advantages, "flat": flat}, state

    def __call__(self, batch: alignzoo.Groups) -> alignzoo.LossOutput:
        completion, settings = batch.completion, self.settings
        counted = ~batch.rewards.isnan()  # (N,)
        if settings.mask_truncated:
            counted = counted & ~batch.truncated
        mask = completion.mask & counted[:, None]  # (N, T)
        old = completion.policy.detach() if batch.old is None else batch.old
        metrics: dict[str, Tensor | alignzoo.Metric] = {
            "frac_reward_zero_std": batch.step["flat"].to(completion.policy.dtype),
            "frac_masked": (~counted).to(completion.policy.dtype),
        }
        gain = self._gain(batch, old, mask, metrics)
        if batch.sampler is not None:
            gain = gain * self._correction(old, batch.sampler, completion.mask, mask, metrics)
        loss = -gain.expand_as(completion.policy)
        if settings.beta > 0 and completion.reference is not None:
            gap = (completion.reference - completion.policy).masked_fill(~completion.mask, 0.0)
            kl = gap.expm1() - gap
            metrics["kl"] = alignzoo.metric(kl.detach(), where=mask)
            loss = loss + settings.beta * kl
        if completion.entropy is not None:
            metrics["entropy"] = alignzoo.metric(completion.entropy, where=mask)
        return self._aggregate(loss, completion, counted, metrics)

    def _gain(
        self, batch: alignzoo.Groups, old: Tensor, mask: Tensor, metrics: dict[str, Tensor | alignzoo.Metric]
    ) -> Tensor:
        """What is to grow, (N, T), or (N, 1) where all tokens have the same; the clipped shares go into metrics."""
        completion, settings = batch.completion, self.settings
        advantage = batch.step["advantages"] if batch.advantages is None else batch.advantages
        advantage = advantage if advantage.dim() == 2 else advantage[:, None]  # (N, T) or (N, 1)
        log_ratio = (completion.policy - old).masked_fill(~completion.mask, 0.0)
        if settings.importance == "sequence":
            log_ratio = log_ratio.sum(-1, keepdim=True) / completion.lengths[:, None]
        ratio = log_ratio.exp()
        cispo = settings.surrogate == "cispo"
        lowest = 0.0 if cispo else 1 - settings.epsilon
        highest = 1 + (settings.epsilon if settings.epsilon_high is None else settings.epsilon_high)
        low, high = (ratio < lowest) & (advantage < 0), (ratio > highest) & (advantage > 0)
        for name, cut in (("low", low), ("high", high), ("region", low | high)):
            where = mask if cut.shape == mask.shape else mask.any(-1, keepdim=True)
            metrics[f"clip_ratio/{name}"] = alignzoo.metric(cut.to(ratio.dtype), where=where)
        if cispo:
            return ratio.clamp(max=highest).detach() * advantage * completion.policy
        return (ratio * advantage).minimum(ratio.clamp(lowest, highest) * advantage)

    def _correction(
        self, old: Tensor, sampler: Tensor, tokens: Tensor, mask: Tensor, metrics: dict[str, Tensor | alignzoo.Metric]
    ) -> Tensor | float:
        """The weight of each token (N, T) or completion (N, 1); how far sampler and trainer are apart into metrics."""
        settings, gap = self.settings, (old - sampler).masked_fill(~tokens, 0.0)  # (N, T)
        metrics["sampler/kl"] = alignzoo.metric(-gap, where=mask)  # of the sampler to the trainer, by its own tokens
        metrics["sampler/logp_difference"] = alignzoo.metric(gap.abs(), where=mask)
        metrics["sampler/logp_difference_max"] = alignzoo.metric(gap.abs(), where=mask, reduce="max")
        if settings.sampler_correction == "none":
            return 1.0
        weight = (gap if settings.sampler_correction == "token" else gap.sum(-1, keepdim=True)).exp()
        above, cap = weight > settings.sampler_cap, settings.sampler_cap
        weight = weight.clamp(max=cap) if settings.sampler_excess == "truncate" else weight.masked_fill(above, 0.0)
        where = mask if weight.shape == mask.shape else mask.any(-1, keepdim=True)
        metrics["sampler/weight"] = alignzoo.metric(weight, where=where)
        metrics["sampler/capped"] = alignzoo.metric(above.to(weight.dtype), where=where)
        return weight

    def _aggregate(
        self, loss: Tensor, completion: alignzoo.LogProbs, counted: Tensor, metrics: dict[str, Tensor | alignzoo.Metric]
    ) -> alignzoo.LossOutput:
        """(N, T) into units: tokens, or completions that hold the sum or mean of theirs."""
        if self.settings.aggregation == "token":
            mask = completion.mask & counted[:, None]
            return alignzoo.LossOutput(loss, per="token", mask=mask, metrics=metrics)
        length = completion.lengths if self.settings.aggregation == "sequence" else self.settings.constant_length
        per_completion = loss.masked_fill(~completion.mask, 0.0).sum(-1) / length  # (N,)
        return alignzoo.LossOutput(per_completion, mask=counted, metrics=metrics)


def advantages_of(rewards: Tensor, group: Tensor, baseline: str, scale: str) -> tuple[Tensor, Tensor]:
    """Advantages of all completions of a step, (N,), and whether all rewards of their group are equal, (N,) bool.

    rewards (N,), NaN where there is none, which gives an advantage of 0; group (N,), 0..B-1. Reckoned in float64, in
    which the mean of equal rewards is that reward exactly.
    """
    scored, size = ~rewards.isnan(), int(group.max()) + 1
    values = rewards.double().masked_fill(~scored, 0.0)

    def per_group(part: Tensor) -> Tensor:
        """The sum over each completion's group, (N,)."""
        return part.new_zeros(size).index_add(0, group, part)[group]

    count = per_group(scored.double())
    centred = (values - per_group(values) / count.clamp(min=1)).masked_fill(~scored, 0.0)
    std = (per_group(centred**2) / (count - 1).clamp(min=1)).sqrt()  # of each completion's group, (N,)
    if baseline == "leave_one_out":
        advantages = centred * count / (count - 1).clamp(min=1)  # R_i less the mean of the others, multiplied out
    elif baseline == "batch":
        advantages = (values - values.sum() / scored.sum().clamp(min=1)).masked_fill(~scored, 0.0)
    else:
        advantages = centred
    if scale == "batch":
        overall = values[scored]
        spread = overall.std() if overall.numel() > 1 else overall.new_zeros(())
        advantages = advantages / (spread + SCALE_FLOOR)
    elif scale == "group":
        advantages = advantages / (std + SCALE_FLOOR)
    return advantages.to(rewards.dtype), std == 0
