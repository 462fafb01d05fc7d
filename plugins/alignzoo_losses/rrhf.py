"""RRHF, rank responses to align human feedback, of Yuan et al. 2023 (arXiv:2304.05302, equations 1 to 4).

    p_i = 1 / |y_i| sum_t log pi(y_it | x, y_i<t)          L_rank = sum_{R_i < R_j} max(0, p_i - p_j)
    L_ft = - sum_t log pi(y_bt | x, y_b<t), b the completion of the highest reward
    L = L_rank + nll_weight L_ft

Reduction: per prompt, a value for each group that has a reward at all. Only the order of rewards counts: completions of
equal rewards are not compared, and of several best ones the first is imitated, as by the authors' argmax. A completion
without a reward (NaN) has no part in either term.

nll_weight is 1 in the paper. The authors' script takes 100 L_rank, and L_ft per token: with answers of n tokens that is
nll_weight = 1 / (100 n).

Logged: rank_loss is L_rank, nll_loss L_ft per token of the imitated completions (nats per token), rank_accuracy the
share of comparisons in which the completion of the higher reward has the higher p.
"""

from __future__ import annotations

from dataclasses import dataclass

import alignzoo


@dataclass(frozen=True)
class Settings:
    nll_weight: float = alignzoo.setting(1.0, "weight of the cross-entropy of the best completion", ge=0)


class RRHF(alignzoo.Loss):
    name, data, needs_reference = "rrhf", "groups", False
    Settings = Settings
    family = "ranking"
    paper = "Yuan et al. 2023, arXiv:2304.05302, equations 1 to 4"
    invariances = frozenset({"prompt_length", "token_order", "reward_shift", "reward_scale"})

    def __call__(self, batch: alignzoo.Groups) -> alignzoo.LossOutput:
        completion, rewards, group = batch.completion, batch.rewards, batch.group
        same = group[:, None] == group  # (N, N)
        # (N, N), whether the row's completion is worse than the column's; one without a reward never is
        worse = same & (rewards[:, None] < rewards)
        tied = same & (rewards[:, None] == rewards)
        after = worse | tied.tril(-1)  # (N, N), the row's completion comes after the column's in the ranking
        best = ~rewards.isnan() & ~after.any(-1)  # (N,), one of each group that has a reward

        p = completion.mean()  # (N,)
        lead = p - p[:, None]  # (N, N), of the column's completion over the row's
        lost = (-lead).relu().masked_fill(~worse, 0.0).sum(-1)  # (N,)
        rank = (lost * same).sum(-1)  # (N,), the same for all of a group
        in_order = (lead.detach() > 0).to(p.dtype)
        return alignzoo.LossOutput(
            rank - self.settings.nll_weight * completion.sum(),
            mask=best,
            metrics={
                "rank_loss": alignzoo.metric(rank.detach(), where=best),
                "nll_loss": alignzoo.metric(-completion.policy.detach(), where=completion.mask & best[:, None]),
                "rank_accuracy": alignzoo.metric(in_order, where=worse),
            },
        )
