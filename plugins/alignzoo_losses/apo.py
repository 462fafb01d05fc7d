"""Anchored preference optimisation of D'Oosterlinck et al. 2024 (arXiv:2408.06266, equations 7 and 8).

    r(y) = beta sum_t log(pi / ref)(y)
    zero: L = 1 - sigmoid(r(y_w)) + sigmoid(r(y_l))
    down: L = sigmoid(r(y_w)) + 1 - sigmoid(r(y_w) - r(y_l))

Reduction: per example. Both are the paper's variants; its losses are lower by the 1, which is there as in TRL and
changes no gradient. zero raises the chosen completion and lowers the rejected one:
for chosen answers that are better than the model's own. down lowers both, the rejected one more: for chosen answers
that are worse than the model's own. The unpaired form of zero is kto with baseline = "none".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import alignzoo


@dataclass(frozen=True)
class Settings:
    beta: float = alignzoo.setting(0.1, "how soon a gain or a loss saturates", gt=0)
    variant: Literal["zero", "down"] = alignzoo.setting("zero", "shall chosen completions rise, or fall too")


class APO(alignzoo.Loss):
    name, data, needs_reference = "apo", "pairs", True
    Settings = Settings
    family = "preference"
    paper = "D'Oosterlinck et al. 2024, arXiv:2408.06266, equations 7 and 8"
    invariances = frozenset({"prompt_length", "shift", "token_order"})

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        beta = self.settings.beta
        chosen, rejected = beta * batch.chosen.log_ratio(), beta * batch.rejected.log_ratio()  # (B,), (B,)
        if self.settings.variant == "zero":
            loss = (-chosen).sigmoid() + rejected.sigmoid()
        else:
            loss = chosen.sigmoid() + (rejected - chosen).sigmoid()
        return alignzoo.LossOutput(loss, rewards=(chosen.detach(), rejected.detach()))
