"""Alignment by optimal transport of Melnyk et al. 2024 (arXiv:2406.05882): distributions compared, not single rows.

    paired:   u = log pi(y_w) - log pi(y_l), v = log ref(y_w) - log ref(y_l) of each pair
    unpaired: u = log(pi / ref)(y_w), v = log(pi / ref)(y_l)
    L = mean_i f(u_(i) - v_(i)), u and v each sorted over the step
    f(d) = - (1 - eps) log sigmoid(beta d) - eps log sigmoid(-beta d)

Reduction: per example. Sorting is over all rows of the optimizer step, in `prepare`; TRL sorts a micro-batch, so that
its loss depends on how a step is cut. eps, label_smoothing, is TRL's; the paper has 0. With unpaired the gradient
reaches both u and v, which belong to different rows: each row gives its part of it, with the other's value from
`prepare`, and the sum over the step is L and its gradient.

Rewards: beta times the log-ratios.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import alignzoo

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Settings:
    beta: float = alignzoo.setting(0.1, "strength of the pull towards the reference", gt=0)
    label_smoothing: float = alignzoo.setting(0.0, "probability that an order is wrong", ge=0, lt=0.5)
    variant: Literal["paired", "unpaired"] = alignzoo.setting(
        "paired", "compare margins with the reference's margins, or chosen with rejected log-ratios"
    )


class AOT(alignzoo.Loss):
    name, data, needs_reference = "aot", "pairs", True
    Settings = Settings
    family = "preference"
    paper = "Melnyk et al. 2024, arXiv:2406.05882"
    invariances = frozenset({"prompt_length", "token_order"})

    def prepare(self, step: alignzoo.Step, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`partner` (2B,): for each pair what its u is compared with, and what its v is."""
        import torch

        assert step.chosen is not None and step.rejected is not None
        chosen, rejected = step.chosen, step.rejected
        if self.settings.variant == "paired":
            u = chosen.policy - rejected.policy  # (B,)
            v = u - chosen.log_ratio() + rejected.log_ratio()
        else:
            u, v = chosen.log_ratio(), rejected.log_ratio()
        of_u, of_v = torch.empty_like(u), torch.empty_like(v)
        order_u, order_v = u.argsort(stable=True), v.argsort(stable=True)
        of_u[order_u], of_v[order_v] = v[order_v], u[order_u]
        return {"partner": torch.stack([of_u, of_v], dim=-1).flatten()}, state

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        beta = self.settings.beta
        chosen, rejected = batch.chosen.log_ratio(), batch.rejected.log_ratio()  # (B,), (B,)
        of_u, of_v = batch.step["partner"].view(-1, 2).unbind(-1)  # (B,), (B,)
        if self.settings.variant == "paired":
            loss = self._penalty(batch.chosen.sum() - batch.rejected.sum() - of_u)
        else:
            other = self._penalty(of_v - rejected)
            loss = self._penalty(chosen - of_u) + other - other.detach()  # v's part: a gradient, and no value
        return alignzoo.LossOutput(loss, rewards=(beta * chosen.detach(), beta * rejected.detach()))

    def _penalty(self, difference: Tensor) -> Tensor:
        from torch.nn.functional import logsigmoid

        smoothing: float = self.settings.label_smoothing
        margin = self.settings.beta * difference
        return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
