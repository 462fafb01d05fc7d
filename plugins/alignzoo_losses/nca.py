"""Noise contrastive alignment of Chen et al. 2024 (arXiv:2402.05369, section 4.1), for pairs.

    r(y) = beta sum_t log(pi / ref)(y)
    L = - log sigmoid(r(y_w)) - 1/2 (log sigmoid(-r(y_w)) + log sigmoid(-r(y_l)))

Reduction: per example. It is the paper's loss for two answers of which one has all the weight; that for many answers
with scores is not here. The absolute likelihood of the chosen completion is held: its own terms are least at
r(y_w) = ln 2. beta is the paper's alpha, 0.01 there.
"""

from __future__ import annotations

from dataclasses import dataclass

import alignzoo


@dataclass(frozen=True)
class Settings:
    beta: float = alignzoo.setting(0.01, "strength of the pull towards the reference", gt=0)


class NCA(alignzoo.Loss):
    name, data, needs_reference = "nca", "pairs", True
    Settings = Settings
    family = "preference"
    paper = "Chen et al. 2024, arXiv:2402.05369, section 4.1"
    invariances = frozenset({"prompt_length", "shift", "token_order"})

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        from torch.nn.functional import logsigmoid

        beta = self.settings.beta
        chosen, rejected = beta * batch.chosen.log_ratio(), beta * batch.rejected.log_ratio()  # (B,), (B,)
        loss = -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
        return alignzoo.LossOutput(loss, rewards=(chosen.detach(), rejected.detach()))
