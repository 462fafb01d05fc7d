"""Is the answer as long as it should be?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Literal

import alignzoo

REQUIRED: Any = MISSING


@dataclass(frozen=True)
class Settings:
    target: int = alignzoo.setting(REQUIRED, "the wanted length", ge=1)
    tolerance: int = alignzoo.setting(0, "how far from it still counts as met", ge=0)
    unit: Literal["words", "characters"] = alignzoo.setting("words", "words: what white space separates")


class Length(alignzoo.Reward):
    """1 at the wanted length, falling to 0 as the distance beyond the tolerance grows to the target itself.

    With d the distance from the target minus the tolerance: 1 for d <= 0, else max(0, 1 - d / target).
    """

    name = "length"
    Settings = Settings

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return [self._value(len(c.split() if self.settings.unit == "words" else c)) for c in completions]

    def _value(self, length: int) -> float:
        distance = max(0, abs(length - self.settings.target) - self.settings.tolerance)
        return float(max(0.0, 1 - distance / self.settings.target))
