"""Dynamic fine-tuning of Wu et al. 2025 (arXiv:2508.05629): the cross-entropy, each token weighed by its probability.

    L = - sum_{i,t} sg(pi(y_it)) log pi(y_it) / sum_i |y_i|

Reduction: per token over the whole optimizer step, as in sft and in TRL (loss_type "dft"). sg stops the gradient, so
that a token's slope is its probability: what the model thinks impossible is not learned. Prompt tokens do not count.

The value is below 1/e for each token and rises while an unlikely token is learned, so it tells little. Also logged,
under TRL's name: nll_loss, the plain cross-entropy (nats per token).
"""

from __future__ import annotations

import alignzoo


class DFT(alignzoo.Loss):
    name, data, needs_reference = "dft", "demonstrations", False
    Settings = alignzoo.NoSettings
    family = "supervised"
    paper = "Wu et al. 2025, arXiv:2508.05629"
    invariances = frozenset({"prompt_length", "token_order"})

    def __call__(self, batch: alignzoo.Demonstrations) -> alignzoo.LossOutput:
        policy, mask = batch.completion.policy, batch.completion.mask  # (B, T), (B, T)
        policy = policy.masked_fill(~mask, 0.0)
        return alignzoo.LossOutput(
            -policy.detach().exp() * policy,
            per="token",
            mask=mask,
            metrics={"nll_loss": alignzoo.metric(-policy.detach(), where=mask)},
        )
