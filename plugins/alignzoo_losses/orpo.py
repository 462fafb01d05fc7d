"""Odds ratio preference optimisation of Hong et al. 2024 (arXiv:2403.07691, equations 6 and 7). No reference model.

    log p(y) = sum_t log pi(y_t | x, y_<t) / |y|              log odds(y) = log p(y) - log(1 - p(y))
    L = NLL(y_w) - lambda log sigmoid(log odds(y_w) - log odds(y_l))

Reduction: two terms with units of their own. NLL is per completion token of y_w over the whole optimizer step, as in
sft; the odds term is per example. Where this departs from other code:
- NLL covers the completion. TRL's covers prompt and completion, that of the authors' code either (disable_prompt_loss);
  both are means over a micro-batch.
- log(1 - p) is log(-expm1(log p)), with log p held at or below -1e-6, since the odds of a certain completion are
  infinite; above that the odds term has no gradient. The authors' log1p(-exp(log p)) is log 0 for such a completion.

Rewards: lambda times log p, as TRL logs them, so the accuracy is that of the log-probs per token. Also logged, under
TRL's names: nll_loss (nats per token), and log_odds_chosen, the log odds of y_w minus those of y_l.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import alignzoo

if TYPE_CHECKING:
    from torch import Tensor

HIGHEST = -1e-6  # of log p; float32 resolves little above it


@dataclass(frozen=True)
class Settings:
    lambda_: float = alignzoo.setting(0.1, "weight of the odds ratio term: the paper's lambda, TRL's beta", gt=0)


class ORPO(alignzoo.Loss):
    name, data, needs_reference = "orpo", "pairs", False
    Settings = Settings
    family = "preference"
    paper = "Hong et al. 2024, arXiv:2403.07691, equations 6 and 7"
    invariances = frozenset({"prompt_length", "token_order"})

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        from torch.nn.functional import logsigmoid

        weight = self.settings.lambda_
        chosen, rejected = batch.chosen.mean(), batch.rejected.mean()  # (B,), (B,)
        ratio = log_odds(chosen) - log_odds(rejected)  # (B,)
        surprise, mask = -batch.chosen.policy, batch.chosen.mask  # (B, T), (B, T)
        odds = alignzoo.LossOutput(
            -weight * logsigmoid(ratio),
            rewards=(weight * chosen.detach(), weight * rejected.detach()),
            metrics={
                "nll_loss": alignzoo.metric(surprise.detach(), where=mask),
                "log_odds_chosen": ratio.detach(),
            },
        )
        return alignzoo.LossOutput(surprise, per="token", mask=mask) + odds


def log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p <= 0; finite with finite gradients for all of them."""
    log_p = log_p.clamp(max=HIGHEST)
    return log_p - (-log_p.expm1()).log()
