"""Does the answer have the wanted form?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Literal

import alignzoo

REQUIRED: Any = MISSING


@dataclass(frozen=True)
class Settings:
    pattern: str = alignzoo.setting(REQUIRED, "a regular expression of Python's re; a dot matches line ends too")
    match: Literal["full", "search"] = alignzoo.setting("full", "full: the whole completion fits; search: a part of it")

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern = {self.pattern!r} is no regular expression: {error}") from error


class Format(alignzoo.Reward):
    """1 where the completion fits a regular expression, else 0."""

    name = "format"
    Settings = Settings

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        pattern = re.compile(self.settings.pattern, re.DOTALL)
        fits = pattern.fullmatch if self.settings.match == "full" else pattern.search
        return [float(fits(completion) is not None) for completion in completions]
