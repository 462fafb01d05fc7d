"""Weighted preference optimisation of Zhou et al. 2024 (arXiv:2406.11827, equation 2): DPO, each pair weighed by how
likely the policy is to write its two answers.

    w(y) = exp(1 / |y| sum_t (log pi(y_t) - log sum_v pi(v)^2))          v runs over the vocabulary
    L = - sg(w(y_w) w(y_l)) log sigmoid(beta (sum_t log(pi / ref)(y_w) - sum_t log(pi / ref)(y_l)))

Reduction: per example; every pair counts 1 in the mean, whatever its weight. The sum of squares is the paper's
alignment with sampled tokens: an answer that is as likely as a sampled one has a weight of about 1. Weights have no
gradient.

Also logged: pair_weight, the product of the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import alignzoo

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Settings:
    beta: float = alignzoo.setting(0.1, "strength of the pull towards the reference", gt=0)


class WPO(alignzoo.Loss):
    name, data, needs_reference = "wpo", "pairs", True
    Settings = Settings
    family = "preference"
    paper = "Zhou et al. 2024, arXiv:2406.11827, equation 2"
    invariances = frozenset({"prompt_length", "token_order"})
    token_stats = frozenset({"log_sum_sq_probs"})

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        from torch.nn.functional import logsigmoid

        beta = self.settings.beta
        chosen, rejected = beta * batch.chosen.log_ratio(), beta * batch.rejected.log_ratio()  # (B,), (B,)
        weight = (log_weight(batch.chosen) + log_weight(batch.rejected)).exp()  # (B,)
        return alignzoo.LossOutput(
            -weight * logsigmoid(chosen - rejected),
            rewards=(chosen.detach(), rejected.detach()),
            metrics={"pair_weight": weight},
        )


def log_weight(completion: alignzoo.LogProbs) -> Tensor:
    """log w of each completion, (N,), about 0 for sampled tokens; detached."""
    assert completion.log_sum_sq_probs is not None
    aligned = completion.policy.detach() - completion.log_sum_sq_probs  # (N, T)
    return aligned.masked_fill(~completion.mask, 0.0).sum(-1) / completion.lengths
