"""Robust DPO of Chowdhury et al. 2024 (arXiv:2403.00409, section 3.1): DPO's loss made unbiased under flipped labels.

    h = beta (sum_t log(pi / ref)(y_w) - sum_t log(pi / ref)(y_l))
    L = (- (1 - eps) log sigmoid(h) + eps log sigmoid(-h)) / (1 - 2 eps)

Reduction: per example. If each label is wrong with probability eps, the expectation of L is DPO's loss on the true
labels. Conservative DPO, `label_smoothing` of dpo, adds the second term instead: it is biased, and it stops at a finite
margin. This one falls without bound where a label is clean, by eps / (1 - 2 eps) for each unit of h.
"""

from __future__ import annotations

from dataclasses import dataclass

import alignzoo


@dataclass(frozen=True)
class Settings:
    beta: float = alignzoo.setting(0.1, "strength of the pull towards the reference", gt=0)
    label_smoothing: float = alignzoo.setting(0.1, "probability that a label is wrong; 0 is dpo", ge=0, lt=0.5)


class Robust(alignzoo.Loss):
    name, data, needs_reference = "robust", "pairs", True
    Settings = Settings
    family = "preference"
    paper = "Chowdhury et al. 2024, arXiv:2403.00409, section 3.1"
    invariances = frozenset({"prompt_length", "shift", "token_order"})

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        from torch.nn.functional import logsigmoid

        beta, flipped = self.settings.beta, self.settings.label_smoothing
        chosen, rejected = beta * batch.chosen.log_ratio(), beta * batch.rejected.log_ratio()  # (B,), (B,)
        margin = chosen - rejected
        loss = (flipped * logsigmoid(-margin) - (1 - flipped) * logsigmoid(margin)) / (1 - 2 * flipped)
        return alignzoo.LossOutput(loss, rewards=(chosen.detach(), rejected.detach()))
