"""Self-play preference optimisation of Wu et al. 2024 (arXiv:2405.00675, equation 4.7), with hard labels.

    r(y) = sum_t log(pi / ref)(y)
    L = (r(y_w) - 1 / (2 beta))^2 + (r(y_l) + 1 / (2 beta))^2

Reduction: per example. It is one iteration of the paper's algorithm, with the probability that an answer wins set to 1
for the chosen and 0 for the rejected one; beta is 1 / eta, 1e-3 there, so that each side heads for +-500 nats and the
loss starts at 1 / (2 beta^2). There pairs come from the policy itself, a model estimates the probabilities, and the
next iteration's reference is this one's policy: none of that is here.

Rewards: beta times the log-ratios, which head for +-1/2.
"""

from __future__ import annotations

from dataclasses import dataclass

import alignzoo


@dataclass(frozen=True)
class Settings:
    beta: float = alignzoo.setting(1e-3, "1 / eta; the target of a log-ratio is +-1/(2 beta) nats", gt=0)


class SPPO(alignzoo.Loss):
    name, data, needs_reference = "sppo", "pairs", True
    Settings = Settings
    family = "preference"
    paper = "Wu et al. 2024, arXiv:2405.00675, equation 4.7"
    invariances = frozenset({"prompt_length", "shift", "token_order"})

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        beta = self.settings.beta
        chosen, rejected = batch.chosen.log_ratio(), batch.rejected.log_ratio()  # (B,), (B,)
        loss = (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
        return alignzoo.LossOutput(loss, rewards=(beta * chosen.detach(), beta * rejected.detach()))
