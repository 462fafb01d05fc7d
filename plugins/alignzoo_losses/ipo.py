"""Identity preference optimisation of Azar et al. 2023 (arXiv:2310.12036, equation 17).

    delta = log(pi / ref)(y_w) - log(pi / ref)(y_l)
    L = (delta - 1 / (2 tau))^2

Reduction: per example. The log-ratio of a completion is, by `reduction`:
- mean: divided by the number of its tokens. The paper does not write this down; TRL, HALOs and LLaMA-Factory do it, TRL
  on the word of the paper's authors.
- sum: not divided, as the equation reads, and as Rafailov et al.'s code and OpenRLHF have it.
The target margin 1 / (2 tau) is in nats per token with mean and in nats with sum, so a tau does not serve for both.

Rewards: tau times the log-ratio that the loss compares, so that their margin heads for 1/2 whatever tau is, and the
accuracy is that of the order that the loss sees. TRL logs beta, its name for tau, times the summed log-ratio, though
its loss averages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import alignzoo


@dataclass(frozen=True)
class Settings:
    tau: float = alignzoo.setting(
        0.1, "strength of the pull towards the reference; the target margin is 1/(2 tau)", gt=0
    )
    reduction: Literal["mean", "sum"] = alignzoo.setting("mean", "average log-ratios over tokens, or sum them")


class IPO(alignzoo.Loss):
    name, data, needs_reference = "ipo", "pairs", True
    Settings = Settings
    family = "preference"
    paper = "Azar et al. 2023, arXiv:2310.12036, equation 17"
    invariances = frozenset({"prompt_length", "shift", "token_order"})

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        tau, reduction = self.settings.tau, self.settings.reduction
        chosen, rejected = batch.chosen.log_ratio(reduction), batch.rejected.log_ratio(reduction)  # (B,), (B,)
        loss = (chosen - rejected - 1 / (2 * tau)) ** 2
        return alignzoo.LossOutput(loss, rewards=(tau * chosen.detach(), tau * rejected.detach()))
