"""Sequence likelihood calibration of Zhao et al. 2023 (SLiC-HF, arXiv:2305.10425, section 2). No reference model.

    L = max(0, delta - log pi(y_w) + log pi(y_l)) - nll_weight log pi(y_w)

Reduction: per example, with log-probs summed over tokens in both summands. A pair beyond delta has no part in the first
one but counts in the mean. The paper's second summand is on a target of its own, the answer of the supervised data or
the best of the ranked ones; pairs hold neither, so it is the chosen one. The weight of 0.1 is ours: the two summands
pull with the same force per nat only within the margin. TRL calls the hinge on log-ratios SLiC, which is hinge here.

Rewards: the summed log-probs, in nats, as delta is.
"""

from __future__ import annotations

from dataclasses import dataclass

import alignzoo


@dataclass(frozen=True)
class Settings:
    delta: float = alignzoo.setting(1.0, "margin in nats of whole completions", ge=0)
    nll_weight: float = alignzoo.setting(0.1, "weight of the cross-entropy of the chosen completion", ge=0)


class SLiC(alignzoo.Loss):
    name, data, needs_reference = "slic", "pairs", False
    Settings = Settings
    family = "preference"
    paper = "Zhao et al. 2023, arXiv:2305.10425, section 2"
    invariances = frozenset({"prompt_length", "token_order"})

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        chosen, rejected = batch.chosen.sum(), batch.rejected.sum()  # (B,), (B,)
        loss = (self.settings.delta - chosen + rejected).relu() - self.settings.nll_weight * chosen
        return alignzoo.LossOutput(loss, rewards=(chosen.detach(), rejected.detach()))
