"""Direct preference optimisation, the sigmoid loss of Rafailov et al. 2023 (arXiv:2305.18290, equation 7).

    delta = sum_t log(pi / ref)(y_w) - sum_t log(pi / ref)(y_l)          h = beta delta
    L = - (1 - eps) log sigmoid(h) - eps log sigmoid(-h)

Reduction: per example. Settings beyond the paper:
- label_smoothing (eps): conservative DPO, the labels flipped with probability eps (Mitchell 2023, "A note on DPO with
  noisy preferences", equation 3). 0 is the paper's loss.
- length_normalised: each log-ratio divided by the number of its tokens (Lambert et al. 2024, Tulu 3, arXiv:2411.15124,
  section 5.1.2, equation 6); beta is then of the order of 2 to 10.
- reference_free: the reference is taken as uniform, its log-ratios left out (as in the authors' code). With
  length_normalised too, the policy's log-probs per token are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import alignzoo

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Settings:
    beta: float = alignzoo.setting(0.1, "strength of the pull towards the reference", gt=0)
    label_smoothing: float = alignzoo.setting(0.0, "probability that a label is wrong", ge=0, lt=0.5)
    length_normalised: bool = alignzoo.setting(False, "average log-ratios over tokens instead of summing them")
    reference_free: bool = alignzoo.setting(False, "compare log-probs without a reference")


class DPO(alignzoo.Loss):
    name, data = "dpo", "pairs"
    Settings = Settings
    family = "preference"
    paper = "Rafailov et al. 2023, arXiv:2305.18290, equation 7"
    invariances = frozenset({"prompt_length", "shift", "token_order"})

    @property
    def needs_reference(self) -> bool:
        return not self.settings.reference_free

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        from torch.nn.functional import logsigmoid

        chosen = self.settings.beta * self._score(batch.chosen)  # (B,)
        rejected = self.settings.beta * self._score(batch.rejected)  # (B,)
        margin, smoothing = chosen - rejected, self.settings.label_smoothing
        loss = -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
        return alignzoo.LossOutput(loss, rewards=(chosen.detach(), rejected.detach()))

    def _score(self, completion: alignzoo.LogProbs) -> Tensor:
        if self.settings.reference_free:
            return completion.mean() if self.settings.length_normalised else completion.sum()
        return completion.log_ratio("mean" if self.settings.length_normalised else "sum")
