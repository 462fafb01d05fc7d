"""The hinge loss on DPO's log-ratios: hinge-norm of Liu et al. 2023 (RSO, arXiv:2309.06657).

    delta = sum_t log(pi / ref)(y_w) - sum_t log(pi / ref)(y_l)
    L = max(0, 1 - beta delta)

Reduction: per example. A pair whose delta is beyond 1 / beta has no loss and no gradient, yet it counts as an example:
the mean is over all pairs, as in TRL (loss_type "hinge"). beta is the paper's gamma, 0.05 there, 0.1 here as in TRL.

The loss is often called SLiC, after Zhao et al. 2023 (arXiv:2305.10425). Theirs compares log-probs, not log-ratios to a
reference, has its margin in nats, and adds a cross-entropy on a reference answer: none of that is here, nor is RSO's
sampling of the pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import alignzoo


@dataclass(frozen=True)
class Settings:
    beta: float = alignzoo.setting(0.1, "scale of the log-ratios; a margin of 1/beta nats is enough", gt=0)


class Hinge(alignzoo.Loss):
    name, data, needs_reference = "hinge", "pairs", True
    Settings = Settings
    family = "preference"
    paper = "Liu et al. 2023, arXiv:2309.06657, hinge-norm"
    invariances = frozenset({"prompt_length", "shift", "token_order"})

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        chosen = self.settings.beta * batch.chosen.log_ratio()  # (B,)
        rejected = self.settings.beta * batch.rejected.log_ratio()  # (B,)
        loss = (1 - (chosen - rejected)).relu()
        return alignzoo.LossOutput(loss, rewards=(chosen.detach(), rejected.detach()))
