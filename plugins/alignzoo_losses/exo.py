"""Efficient exact optimisation of Ji et al. 2024 (arXiv:2402.00856, equation 16), for pairs (EXO-pref).

    q = sigmoid(beta (sum_t log(pi / ref)(y_w) - sum_t log(pi / ref)(y_l)))
    L = q log(q / (1 - eps)) + (1 - q) log((1 - q) / eps)

Reduction: per example. L is the reverse KL divergence from the policy's preference to that of the labels, each of which
is wrong with probability eps; DPO is the forward one. It is 0 where q = 1 - eps, at a margin of
log((1 - eps) / eps) / beta nats, finite for eps above 0 only, and flat far on the wrong side.
"""

from __future__ import annotations

from dataclasses import dataclass

import alignzoo


@dataclass(frozen=True)
class Settings:
    beta: float = alignzoo.setting(0.1, "strength of the pull towards the reference", gt=0)
    label_smoothing: float = alignzoo.setting(1e-3, "probability that a label is wrong", gt=0, lt=0.5)


class EXO(alignzoo.Loss):
    name, data, needs_reference = "exo", "pairs", True
    Settings = Settings
    family = "preference"
    paper = "Ji et al. 2024, arXiv:2402.00856, equation 16"
    invariances = frozenset({"prompt_length", "shift", "token_order"})

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        import math

        from torch.nn.functional import logsigmoid

        beta, flipped = self.settings.beta, self.settings.label_smoothing
        chosen, rejected = beta * batch.chosen.log_ratio(), beta * batch.rejected.log_ratio()  # (B,), (B,)
        margin = chosen - rejected
        right = margin.sigmoid() * (logsigmoid(margin) - math.log1p(-flipped))
        wrong = (-margin).sigmoid() * (logsigmoid(-margin) - math.log(flipped))
        return alignzoo.LossOutput(right + wrong, rewards=(chosen.detach(), rejected.detach()))
