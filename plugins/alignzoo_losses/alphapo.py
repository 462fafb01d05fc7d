"""AlphaPO of Gupta et al. 2025 (arXiv:2501.03884): SimPO with another shape of the reward. No reference model.

    p(y) = exp(1 / |y| sum_t log pi(y_t | x, y_<t))          r(y) = beta (1 - p(y)^-alpha) / alpha
    L = - log sigmoid(r(y_w) - r(y_l) - gamma)

Reduction: per example. alpha towards 0 is SimPO, r = beta log p. Above 0 a reward falls ever steeper as p does, below 0
it levels off. p^-alpha is held at or below e^80, so that it has a float32; beyond that there is no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import alignzoo

if TYPE_CHECKING:
    from torch import Tensor

HIGHEST = 80.0  # of an exponent


@dataclass(frozen=True)
class Settings:
    alpha: float = alignzoo.setting(0.25, "shape of the reward; not 0, which is simpo")
    beta: float = alignzoo.setting(2.5, "scale of the rewards", gt=0)
    gamma: float = alignzoo.setting(0.1, "margin of the rewards that is asked for", ge=0)

    def __post_init__(self) -> None:
        if self.alpha == 0:
            raise ValueError('alpha = 0 is the loss "simpo"')


class AlphaPO(alignzoo.Loss):
    name, data, needs_reference = "alphapo", "pairs", False
    Settings = Settings
    family = "preference"
    paper = "Gupta et al. 2025, arXiv:2501.03884"
    invariances = frozenset({"prompt_length", "token_order"})

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        from torch.nn.functional import logsigmoid

        chosen, rejected = self._reward(batch.chosen.mean()), self._reward(batch.rejected.mean())  # (B,), (B,)
        loss = -logsigmoid(chosen - rejected - self.settings.gamma)
        return alignzoo.LossOutput(loss, rewards=(chosen.detach(), rejected.detach()))

    def _reward(self, log_p: Tensor) -> Tensor:
        """(1 - p^-alpha) / alpha without cancellation near p = 1."""
        alpha: float = self.settings.alpha
        beta: float = self.settings.beta
        return -beta * (-alpha * log_p).clamp(max=HIGHEST).expm1() / alpha
