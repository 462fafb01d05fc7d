"""Simple preference optimisation of Meng et al. 2024 (arXiv:2405.14734, equation 6). No reference model.

    r(y) = beta / |y| sum_t log pi(y_t | x, y_<t)
    L = - log sigmoid(r(y_w) - r(y_l) - gamma)

Reduction: per example. gamma is in the unit of the rewards, as in the paper; the authors' scripts and OpenRLHF give
gamma / beta instead. The paper has no supervised term (CPO-SimPO is this loss with one: TRL's cpo_alpha).
"""

from __future__ import annotations

from dataclasses import dataclass

import alignzoo


@dataclass(frozen=True)
class Settings:
    beta: float = alignzoo.setting(2.0, "scale of the log-probs per token", gt=0)
    gamma: float = alignzoo.setting(1.0, "margin of the rewards that is asked for", ge=0)


class SimPO(alignzoo.Loss):
    name, data, needs_reference = "simpo", "pairs", False
    Settings = Settings
    family = "preference"
    paper = "Meng et al. 2024, arXiv:2405.14734, equation 6"
    invariances = frozenset({"prompt_length", "token_order"})

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        from torch.nn.functional import logsigmoid

        chosen, rejected = self.settings.beta * batch.chosen.mean(), self.settings.beta * batch.rejected.mean()  # (B,)
        loss = -logsigmoid(chosen - rejected - self.settings.gamma)
        return alignzoo.LossOutput(loss, rewards=(chosen.detach(), rejected.detach()))
