"""DPO with a cross-entropy on the chosen completion: iterative RPO of Pang et al. 2024 (arXiv:2404.19733, equation 1).

    h = beta (sum_t log(pi / ref)(y_w) - sum_t log(pi / ref)(y_l))
    L = - log sigmoid(h) - nll_weight / |y_w| sum_t log pi(y_w)

Reduction: per example, both summands: the cross-entropy is a mean over the tokens of each chosen completion, so a short
one weighs as much as a long one. nll_weight is the paper's alpha. TRL's loss_type ["sigmoid", "sft"] averages it over
the tokens of a micro-batch. The name is also that of Liu et al. 2024 (arXiv:2405.16436), who sum over the tokens and
weigh it by eta beta. The iterations, with new answers and a new reference each, are not here.

Also logged, under TRL's name: nll_loss (nats per token, a mean over completions).
"""

from __future__ import annotations

from dataclasses import dataclass

import alignzoo


@dataclass(frozen=True)
class Settings:
    beta: float = alignzoo.setting(0.1, "strength of the pull towards the reference", gt=0)
    nll_weight: float = alignzoo.setting(1.0, "weight of the cross-entropy of the chosen completion", ge=0)


class RPO(alignzoo.Loss):
    name, data, needs_reference = "rpo", "pairs", True
    Settings = Settings
    family = "preference"
    paper = "Pang et al. 2024, arXiv:2404.19733, equation 1"
    invariances = frozenset({"prompt_length", "token_order"})

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        from torch.nn.functional import logsigmoid

        beta = self.settings.beta
        chosen, rejected = beta * batch.chosen.log_ratio(), beta * batch.rejected.log_ratio()  # (B,), (B,)
        surprise = -batch.chosen.mean()  # (B,)
        return alignzoo.LossOutput(
            self.settings.nll_weight * surprise - logsigmoid(chosen - rejected),
            rewards=(chosen.detach(), rejected.detach()),
            metrics={"nll_loss": surprise.detach()},
        )
