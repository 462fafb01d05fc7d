"""alpha-DPO of Wu et al. 2024 (arXiv:2410.10148): SimPO whose margin differs from pair to pair.

    r(y) = beta / |y| sum_t log pi(y_t | x, y_<t)
    M = 1 / |y_w| sum_t log(pi / ref)(y_w) - 1 / |y_l| sum_t log(pi / ref)(y_l)
    z = (M - mean of M) / (std of M + 1e-4)
    L = - log sigmoid(r(y_w) - r(y_l) - sg(gamma + alpha z))

Reduction: per example. sg stops the gradient: a pair that the policy already tells apart better than the reference does
is asked for a wider margin than the others. alpha = 0 is simpo. The paper's M is beta times this one, which z does not
see. As in simpo, gamma and alpha are in the unit of the rewards; the authors' scripts give gamma / beta
(gamma_beta_ratio) and alpha / beta (alpha).

Mean and std, with Bessel's correction, are those of the whole optimizer step, averaged over the steps so far with
weights that fall by `momentum` a step. The authors' code has 0.9, starts both averages from 0 and never corrects for
that, so that its first std is a tenth of what it is; here the weights add up to 1 from the first step on. 1e-4 holds z
near 0 at the start, where policy and reference are the same and so is every M. A step of one pair adds no std.

Rewards: r(y), as in simpo. The margin that is asked for is logged as `target_margin`. Mean and std cost a forward pass
without gradients over the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import alignzoo

if TYPE_CHECKING:
    from torch import Tensor

SCALE_FLOOR = 1e-4  # beside the std, nats per token


@dataclass(frozen=True)
class Settings:
    beta: float = alignzoo.setting(2.5, "scale of the log-probs per token", gt=0)
    gamma: float = alignzoo.setting(1.5, "margin of the rewards that is asked for where M is at its mean", ge=0)
    alpha: float = alignzoo.setting(0.5, "how much wider it is where M is one std above its mean", ge=0)
    momentum: float = alignzoo.setting(0.9, "how much of mean and std comes from earlier steps", ge=0, lt=1)


class AlphaDPO(alignzoo.Loss):
    name, data = "alpha_dpo", "pairs"
    Settings = Settings
    family = "preference"
    paper = "Wu et al. 2024, arXiv:2410.10148"
    invariances = frozenset({"prompt_length", "shift", "token_order"})

    @property
    def needs_reference(self) -> bool:
        return bool(self.settings.alpha > 0)

    @property
    def prepare_pass(self) -> bool:
        return self.needs_reference

    def init_state(self) -> dict[str, Tensor]:
        """Weighted sums of the means and of the stds of steps, (2,), and of their weights, (2,)."""
        import torch

        none = torch.zeros(2, dtype=torch.float64)
        return {"sums": none, "weights": none.clone()} if self.needs_reference else {}

    def prepare(self, step: alignzoo.Step, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`mean` and `std` of M, ()."""
        import torch

        if step.chosen is None or step.rejected is None:
            return {}, state
        ahead = (step.chosen.log_ratio("mean") - step.rejected.log_ratio("mean")).double()  # (B,)
        several, momentum = len(ahead) > 1, self.settings.momentum
        found = torch.stack([ahead.mean(), ahead.std() if several else ahead.new_zeros(())])
        part = ahead.new_tensor([1 - momentum, 1 - momentum if several else 0.0])  # of this step in mean and std
        sums = (1 - part) * state["sums"].to(part.device) + part * found
        weights = (1 - part) * state["weights"].to(part.device) + part
        mean, std = sums / weights.clamp(min=1 - momentum)
        return {"mean": mean, "std": std}, {"sums": sums, "weights": weights}

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        from torch.nn.functional import logsigmoid

        settings = self.settings
        chosen, rejected = settings.beta * batch.chosen.mean(), settings.beta * batch.rejected.mean()  # (B,), (B,)
        target = chosen.new_full(chosen.shape, settings.gamma)
        if self.needs_reference:
            ahead = (batch.chosen.log_ratio("mean") - batch.rejected.log_ratio("mean")).detach()
            z = (ahead - batch.step["mean"]) / (batch.step["std"] + SCALE_FLOOR)
            target = target + settings.alpha * z.to(chosen.dtype)
        return alignzoo.LossOutput(
            -logsigmoid(chosen - rejected - target),
            rewards=(chosen.detach(), rejected.detach()),
            metrics={"target_margin": target},
        )
