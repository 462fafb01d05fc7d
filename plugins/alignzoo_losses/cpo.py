"""Contrastive preference optimisation of Xu et al. 2024 (arXiv:2401.08417). No reference model.

    L = - log sigmoid(beta log pi(y_w) - beta log pi(y_l)) - nll_weight log pi(y_w) / |y_w|

Reduction: two terms with units of their own. The preference term is per example, with log-probs summed over tokens. The
other is per completion token of y_w over the whole optimizer step, as in sft: the authors' code and TRL average over
tokens too, those of a micro-batch. In the paper it is not divided by the length, and its weight is 1.

Rewards: beta times the summed log-probs, as TRL logs them. Also logged, under TRL's name: nll_loss (nats per token).
"""

from __future__ import annotations

from dataclasses import dataclass

import alignzoo


@dataclass(frozen=True)
class Settings:
    beta: float = alignzoo.setting(0.1, "scale of the log-probs", gt=0)
    nll_weight: float = alignzoo.setting(1.0, "weight of the cross-entropy of the chosen completion", ge=0)


class CPO(alignzoo.Loss):
    name, data, needs_reference = "cpo", "pairs", False
    Settings = Settings
    family = "preference"
    paper = "Xu et al. 2024, arXiv:2401.08417"
    invariances = frozenset({"prompt_length", "token_order"})

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        from torch.nn.functional import logsigmoid

        chosen, rejected = self.settings.beta * batch.chosen.sum(), self.settings.beta * batch.rejected.sum()  # (B,)
        weight: float = self.settings.nll_weight
        surprise, mask = -batch.chosen.policy, batch.chosen.mask  # (B, T), (B, T)
        preference = alignzoo.LossOutput(
            -logsigmoid(chosen - rejected),
            rewards=(chosen.detach(), rejected.detach()),
            metrics={"nll_loss": alignzoo.metric(surprise.detach(), where=mask)},
        )
        return preference + weight * alignzoo.LossOutput(surprise, per="token", mask=mask)
