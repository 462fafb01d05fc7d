"""A reward model by the Bradley-Terry model, as in InstructGPT (Ouyang et al. 2022, arXiv:2203.02155, equation 1).

    L = - log sigmoid(r_w - r_l - m) + c (r_w + r_l)^2

r is the score of a completion: the output of a scalar head (model.head = "scalar"). Reduction: per example; InstructGPT
averages over all pairs of a prompt's K ranked answers, here each pair is a row. Beyond that paper:
- margin (m): a number of each row, larger where the preference is clearer (Llama 2, Touvron et al. 2023,
  arXiv:2307.09288, equation 2, whose tables give 0 to 3). The column must stand in data.keep.
- center_rewards_coefficient (c): holds the scores of a pair around 0, which the first term leaves free (Eisenstein et
  al. 2023, arXiv:2312.09244). TRL's RewardTrainer has both under these names.

Rewards: the scores, as of every loss on scores that gives none of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import alignzoo


@dataclass(frozen=True)
class Settings:
    margin: str | None = alignzoo.setting(None, "column of data.keep by which chosen shall lead; none if not given")
    center_rewards_coefficient: float = alignzoo.setting(0.0, "weight of the squared sum of a pair's scores", ge=0)


class BradleyTerry(alignzoo.Loss):
    name, data, needs_reference, needs_scores = "bradley_terry", "pairs", False, True
    Settings = Settings
    family = "reward model"
    paper = "Ouyang et al. 2022, arXiv:2203.02155, equation 1"
    invariances = frozenset({"prompt_length", "token_order"})

    @property
    def columns(self) -> tuple[str, ...]:
        return () if self.settings.margin is None else (self.settings.margin,)

    def __call__(self, batch: alignzoo.ScoredPairs) -> alignzoo.LossOutput:
        from torch.nn.functional import logsigmoid

        chosen, rejected = batch.chosen.score, batch.rejected.score  # (B,), (B,)
        lead = chosen - rejected
        if self.settings.margin is not None:
            lead = lead - batch.extra[self.settings.margin]
        loss = -logsigmoid(lead)
        if self.settings.center_rewards_coefficient:
            loss = loss + self.settings.center_rewards_coefficient * (chosen + rejected) ** 2
        return alignzoo.LossOutput(loss)
