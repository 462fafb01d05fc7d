"""Supervised fine-tuning of Ouyang et al. 2022 (InstructGPT, arXiv:2203.02155, section 3.5): the cross-entropy of
demonstrated completions.

    L = - sum_{i,t} log pi(y_it | x_i, y_i<t) / sum_i |y_i|

Reduction: per token over the whole optimizer step, so a long completion weighs more than a short one, and the value
does not depend on how the step is cut into micro-batches. Prompt tokens do not count. The paper writes no
equation down.
"""

from __future__ import annotations

import alignzoo


class SFT(alignzoo.Loss):
    name, data, needs_reference = "sft", "demonstrations", False
    Settings = alignzoo.NoSettings
    family = "supervised"
    paper = "Ouyang et al. 2022, arXiv:2203.02155, section 3.5"
    invariances = frozenset({"prompt_length", "token_order"})

    def __call__(self, batch: alignzoo.Demonstrations) -> alignzoo.LossOutput:
        return alignzoo.LossOutput(-batch.completion.policy, per="token", mask=batch.completion.mask)
