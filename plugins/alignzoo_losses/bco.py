"""Binary classifier optimisation of Jung et al. 2024 (arXiv:2404.04656, section 4), for pairs: see bco_unpaired too.

    r(y) = beta sum_t log(pi / ref)(y)          s = half the mean of r(y_w) plus half that of r(y_l)
    L = - log sigmoid(r(y_w) - s) - log sigmoid(s - r(y_l))

Reduction: per example. A bound on DPO's loss, in which each answer is classified by itself. s, the reward shift, has no
gradient; it is a mean over all rows of all steps so far, this one's among them. shift = "none" sets it to 0, which is
TRL's bco_pair. The paper also weighs rows by how the prompts of the two labels differ; that is not here.

s is logged as `shift`, in the unit of the rewards. It costs a forward pass without gradients over the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import alignzoo

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Settings:
    beta: float = alignzoo.setting(0.01, "strength of the pull towards the reference", gt=0)
    shift: Literal["running", "none"] = alignzoo.setting("running", "what rewards are compared with: their mean, or 0")


class BCO(alignzoo.Loss):
    name, data, needs_reference = "bco", "pairs", True
    Settings = Settings
    family = "preference"
    paper = "Jung et al. 2024, arXiv:2404.04656, section 4"
    invariances = frozenset({"prompt_length", "shift", "token_order"})

    @property
    def prepare_pass(self) -> bool:
        return bool(self.settings.shift == "running")

    def init_state(self) -> dict[str, Tensor]:
        return no_rewards() if self.prepare_pass else {}

    def prepare(self, step: alignzoo.Step, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if step.chosen is None or step.rejected is None:
            return {}, state
        beta = self.settings.beta
        return shifted(state, beta * step.chosen.log_ratio(), beta * step.rejected.log_ratio())

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        from torch.nn.functional import logsigmoid

        beta = self.settings.beta
        chosen, rejected = beta * batch.chosen.log_ratio(), beta * batch.rejected.log_ratio()  # (B,), (B,)
        shift = batch.step["shift"] if self.prepare_pass else chosen.new_zeros(())  # ()
        return alignzoo.LossOutput(
            -logsigmoid(chosen - shift) - logsigmoid(shift - rejected),
            rewards=(chosen.detach(), rejected.detach()),
            metrics={"shift": shift.expand_as(chosen)} if self.prepare_pass else {},
        )


def no_rewards() -> dict[str, Tensor]:
    """The state before the first step: sum and number of the rewards of good and of bad answers, (2,) each."""
    import torch

    return {"sums": torch.zeros(2, dtype=torch.float64), "counts": torch.zeros(2, dtype=torch.float64)}


def shifted(state: dict[str, Tensor], good: Tensor, bad: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The shift, () as `shift`, with the rewards of a step added to the state: the mean of the means of both sides.

    A side that no step has held so far is left out.
    """
    import torch

    sums = state["sums"].to(good.device) + torch.stack([good.sum(), bad.sum()])
    counts = state["counts"].to(good.device) + sums.new_tensor([len(good), len(bad)])
    means = (sums / counts.clamp(min=1)).sum() / (counts > 0).sum()
    return {"shift": means.to(good.dtype)}, {"sums": sums, "counts": counts}
