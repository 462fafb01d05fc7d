"""Binary classifier optimisation of Jung et al. 2024 (arXiv:2404.04656, section 4), for labelled rows.

    r(y) = beta sum_t log(pi / ref)(y)          s = half the mean of desirable rewards plus half that of others
    L = - log sigmoid(r(y) - s) for a desirable y, - log sigmoid(s - r(y)) for another one

Reduction: per example over all rows of the step, whatever their labels. s has no gradient; its means are over all rows
of all steps so far, this one's among them, each label by itself. TRL's BCOTrainer, until it was removed, took one mean
over the rewards of both labels. shift = "none" sets s to 0. The paper's weights by prompts are not here.

s is logged as `shift`, and tells the good from the bad. It costs a forward pass without gradients over the step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import alignzoo
from alignzoo_losses.bco import Settings, no_rewards, shifted

if TYPE_CHECKING:
    from torch import Tensor


class UnpairedBCO(alignzoo.Loss):
    name, data, needs_reference = "bco_unpaired", "labelled", True
    Settings = Settings
    family = "unpaired"
    paper = "Jung et al. 2024, arXiv:2404.04656, section 4"
    invariances = frozenset({"prompt_length", "shift", "token_order"})

    @property
    def prepare_pass(self) -> bool:
        return bool(self.settings.shift == "running")

    def init_state(self) -> dict[str, Tensor]:
        return no_rewards() if self.prepare_pass else {}

    def prepare(self, step: alignzoo.Step, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if step.completion is None or step.label is None:
            return {}, state
        reward = self.settings.beta * step.completion.log_ratio()  # (B,)
        return shifted(state, reward[step.label], reward[~step.label])

    def __call__(self, batch: alignzoo.Labelled) -> alignzoo.LossOutput:
        from torch.nn.functional import logsigmoid

        reward = self.settings.beta * batch.completion.log_ratio()  # (B,)
        shift = batch.step["shift"] if self.prepare_pass else reward.new_zeros(())  # ()
        sign = batch.label.to(reward.dtype) * 2 - 1
        return alignzoo.LossOutput(
            -logsigmoid(sign * (reward - shift)),
            rewards=reward.detach(),
            threshold=shift,
            metrics={"shift": shift.expand_as(reward)} if self.prepare_pass else {},
        )
