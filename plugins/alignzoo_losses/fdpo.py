"""f-DPO of Wang et al. 2023 (arXiv:2309.16240): DPO under another divergence from the reference.

    u = exp(sum_t log(pi / ref)(y))
    L = - log sigmoid(beta f'(u_w) - beta f'(u_l))
    f'(u): forward_kl 1 - 1/u;   js log(2u / (1 + u));   alpha (1 - u^-alpha) / alpha

Reduction: per example. The reverse KL divergence, f'(u) = log u + 1, is the loss dpo: constants cancel. forward_kl is
alpha at 1, and alpha towards 0 is dpo; alpha here is the paper's, TRL's f_alpha_divergence_coef is 1 - alpha. Powers of
u are held at or below e^80, so that they have a float32; a completion that the policy has made less likely than that
has no gradient. Log-ratios of whole completions reach tens of nats, which forward_kl and alpha make exponentials of.

Rewards: beta f'(u).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import alignzoo

if TYPE_CHECKING:
    from torch import Tensor

HIGHEST = 80.0  # of an exponent


@dataclass(frozen=True)
class Settings:
    beta: float = alignzoo.setting(0.1, "strength of the pull towards the reference", gt=0)
    divergence: Literal["js", "forward_kl", "alpha"] = alignzoo.setting("js", "the divergence from the reference")
    alpha: float = alignzoo.setting(
        0.5, 'with divergence "alpha": from 0, the reverse KL, to 1, the forward one', gt=0, lt=1
    )


class FDPO(alignzoo.Loss):
    name, data, needs_reference = "fdpo", "pairs", True
    Settings = Settings
    family = "preference"
    paper = "Wang et al. 2023, arXiv:2309.16240"
    invariances = frozenset({"prompt_length", "shift", "token_order"})

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        from torch.nn.functional import logsigmoid

        chosen, rejected = self._reward(batch.chosen.log_ratio()), self._reward(batch.rejected.log_ratio())  # (B,)
        return alignzoo.LossOutput(-logsigmoid(chosen - rejected), rewards=(chosen.detach(), rejected.detach()))

    def _reward(self, ratio: Tensor) -> Tensor:
        """beta f'(u) from log u, (B,)."""
        import math

        from torch.nn.functional import logsigmoid

        beta: float = self.settings.beta
        if self.settings.divergence == "js":
            return beta * (math.log(2) + logsigmoid(ratio))
        alpha: float = 1.0 if self.settings.divergence == "forward_kl" else self.settings.alpha
        return -beta * (-alpha * ratio).clamp(max=HIGHEST).expm1() / alpha
