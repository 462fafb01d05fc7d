"""Kahneman-Tversky optimisation of Ethayarajh et al. 2024 (arXiv:2402.01306, equations 7 and 8).

    r(x, y) = sum_t log(pi / ref)(y | x)          z = max(0, mean over the step of r(x, y')), y' from another prompt
    L = w_d (1 - sigmoid(beta (r - z))) for a desirable y, w_u (1 - sigmoid(beta (z - r))) for an undesirable one

Reduction: per example over all rows of the optimizer step, whatever their labels; a step may hold one label only. z
estimates the KL divergence between policy and reference, and has no gradient. Where this departs from paper and TRL:
- y' is picked once for each row, by content, out of the whole data set, and is never an answer to the row's own prompt.
  They rotate the completions of a micro-batch, so it needs two rows, TRL's cannot be shuffled, and where both answers
  to a prompt are in it, one is taken for the other's y'.
- z is one number for the whole step, not one for each micro-batch.
- baseline = "none" leaves z out, and the forward passes for it: the loss that TRL calls apo_zero_unpaired.

For n_d desirable and n_u undesirable rows the paper advises weights with w_d n_d / (w_u n_u) between 1 and 3/2
(equation 9). Rewards: beta r, as TRL logs them; beta z tells the good from the bad. z is logged as `baseline`, in nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import alignzoo

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Settings:
    beta: float = alignzoo.setting(0.1, "how soon a gain or a loss saturates; more stays nearer to the reference", gt=0)
    desirable_weight: float = alignzoo.setting(1.0, "weight of desirable rows", gt=0)
    undesirable_weight: float = alignzoo.setting(1.0, "weight of undesirable rows", gt=0)
    baseline: Literal["mismatched", "none"] = alignzoo.setting(
        "mismatched", "what a row is compared with: completions of other prompts, or nothing"
    )


class KTO(alignzoo.Loss):
    name, data, needs_reference = "kto", "labelled", True
    Settings = Settings
    family = "unpaired"
    paper = "Ethayarajh et al. 2024, arXiv:2402.01306, equations 7 and 8"
    invariances = frozenset({"prompt_length", "shift", "token_order"})

    @property
    def needs_mismatched(self) -> bool:
        return bool(self.settings.baseline == "mismatched")

    @property
    def prepare_pass(self) -> bool:
        return self.needs_mismatched

    def prepare(self, step: alignzoo.Step, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if step.mismatched is None:
            return {}, state
        return {"baseline": step.mismatched.log_ratio().mean().clamp(min=0)}, state  # ()

    def __call__(self, batch: alignzoo.Labelled) -> alignzoo.LossOutput:
        import torch

        settings, ratio = self.settings, batch.completion.log_ratio()  # (B,)
        baseline = batch.step["baseline"] if self.needs_mismatched else ratio.new_zeros(())  # ()
        gain = settings.beta * (ratio - baseline)
        desirable = settings.desirable_weight * torch.sigmoid(-gain)  # 1 - sigmoid(gain), without cancellation
        undesirable = settings.undesirable_weight * torch.sigmoid(gain)
        return alignzoo.LossOutput(
            torch.where(batch.label, desirable, undesirable),
            rewards=settings.beta * ratio.detach(),
            threshold=settings.beta * baseline,
            metrics={"baseline": baseline.expand_as(ratio)} if self.needs_mismatched else {},
        )
