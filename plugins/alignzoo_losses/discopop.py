"""DiscoPOP of Lu et al. 2024 (arXiv:2406.08414, equation 5): a loss that a language model found.

    h = beta (sum_t log(pi / ref)(y_w) - sum_t log(pi / ref)(y_l))          m = sigmoid(h / tau)
    L = - (1 - m) log sigmoid(h) + m exp(-h)

Reduction: per example. L is not convex: with the paper's settings it has a dip at log-ratios of -2.37 nats and a crest
at 1.44, as the paper says. Between them, so at the start too, its slope pulls a pair the wrong way.
m exp(-h) is computed as exp(log m - h), which is 0 far on the wrong side, where TRL's product is 0 times infinity.
"""

from __future__ import annotations

from dataclasses import dataclass

import alignzoo


@dataclass(frozen=True)
class Settings:
    beta: float = alignzoo.setting(0.05, "strength of the pull towards the reference", gt=0)
    tau: float = alignzoo.setting(0.05, "width of the passage from one loss to the other", gt=0, lt=1)


class DiscoPOP(alignzoo.Loss):
    name, data, needs_reference = "discopop", "pairs", True
    Settings = Settings
    family = "preference"
    paper = "Lu et al. 2024, arXiv:2406.08414, equation 5"
    invariances = frozenset({"prompt_length", "shift", "token_order"})

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        from torch.nn.functional import logsigmoid

        beta, tau = self.settings.beta, self.settings.tau
        chosen, rejected = beta * batch.chosen.log_ratio(), beta * batch.rejected.log_ratio()  # (B,), (B,)
        margin = chosen - rejected
        logistic = -(-margin / tau).sigmoid() * logsigmoid(margin)
        exponential = (logsigmoid(margin / tau) - margin).exp()
        return alignzoo.LossOutput(logistic + exponential, rewards=(chosen.detach(), rejected.detach()))
