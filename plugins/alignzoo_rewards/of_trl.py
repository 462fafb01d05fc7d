"""Reward functions of TRL, by their own code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import alignzoo


@dataclass(frozen=True)
class RepetitionSettings:
    ngram: int = alignzoo.setting(3, "how many units in a row make a repetition", ge=1)
    penalty: float = alignzoo.setting(-1.0, "the value of an answer that is nothing but repetition", le=0)
    unit: Literal["words", "characters"] = alignzoo.setting("words", "words: what white space separates")


class Repetition(alignzoo.Reward):
    """From 0 without repetition to `penalty`: the share of n-grams that were there before, times `penalty`.

    Yeo et al. 2025 (arXiv:2502.03373, appendix C.2) as TRL has it. It counts n-grams of words or characters, where the
    paper and TRL count tokens: a reward sees texts.
    """

    name = "repetition"
    Settings = RepetitionSettings

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        from trl.rewards import get_repetition_penalty_reward

        penalty = get_repetition_penalty_reward(self.settings.ngram, self.settings.penalty)
        values = penalty([c.split() if self.settings.unit == "words" else list(c) for c in completions])
        return [float(value) for value in values]


class Think(alignzoo.Reward):
    """1 where the completion begins with one `<think>...</think>`, else 0: TRL's think_format_reward."""

    name = "think"
    Settings = alignzoo.NoSettings

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        from trl.rewards import think_format_reward

        return [float(value) for value in think_format_reward([[{"content": c}] for c in completions])]
