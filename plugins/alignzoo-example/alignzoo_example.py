"""f-DPO with the Jensen-Shannon divergence (Wang et al. 2023, arXiv:2309.16240, theorem 1 and the loss it leads to).

DPO keeps the policy near the reference by the reverse KL divergence, and its implicit reward is beta log u, where
u = pi(y|x) / ref(y|x). Another f-divergence gives the reward beta f'(u). Of Jensen-Shannon:

    f(u) = u log u - (1 + u) log((1 + u) / 2)        f'(u) = log(2 u / (1 + u)) = log 2 + log sigmoid(log u)
    L = - log sigmoid(beta f'(u_w) - beta f'(u_l))

f' is below log 2: a completion that is already much likelier than under the reference gains nothing by growing further.

Reduction: per example. Deviations: none; u is taken in log space, so that neither it nor its inverse overflows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import alignzoo


@dataclass(frozen=True)
class Settings:
    beta: float = alignzoo.setting(0.1, "strength of the pull towards the reference", gt=0)


class FdpoJsLoss(alignzoo.Loss):
    name, data, needs_reference = "fdpo-js", "pairs", True
    Settings = Settings
    contract = 1
    family = "preference"
    paper = "Wang et al. 2023, arXiv:2309.16240, theorem 1"
    invariances = frozenset({"prompt_length", "shift", "token_order"})

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        from torch.nn.functional import logsigmoid  # here, so that `alignzoo --help` stays fast

        chosen = self.settings.beta * (math.log(2) + logsigmoid(batch.chosen.log_ratio()))  # (B,)
        rejected = self.settings.beta * (math.log(2) + logsigmoid(batch.rejected.log_ratio()))  # (B,)
        return alignzoo.LossOutput(-logsigmoid(chosen - rejected), rewards=(chosen.detach(), rejected.detach()))


@alignzoo.hookimpl
def alignzoo_losses() -> list[type[alignzoo.Loss]]:
    return [FdpoJsLoss]
