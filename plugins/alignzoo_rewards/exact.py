"""Is the answer that of the row, letter by letter?"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import alignzoo


@dataclass(frozen=True)
class Settings:
    answer: str = alignzoo.setting("answer", "column with the right answer; a list of them: any will do")
    find: str = alignzoo.setting(
        "", r"of a completion only the last match of this regular expression counts, or its first group: \d+"
    )
    after: str = alignzoo.setting("", 'only what follows the last of these marks counts, e.g. "####"')
    ignore_case: bool = alignzoo.setting(True, "take large and small letters as the same")
    ignore_punctuation: bool = alignzoo.setting(True, "leave out ASCII punctuation")

    def __post_init__(self) -> None:
        try:
            re.compile(self.find)
        except re.error as error:
            raise ValueError(f"find = {self.find!r} is no regular expression: {error}") from error


class Exact(alignzoo.Reward):
    """1 where the completion is the row's answer, else 0; None where the row has no answer.

    Both are compared after Unicode's NFKC and with every stretch of white space as one blank, none at the ends.
    """

    name = "exact"
    Settings = Settings

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.settings.answer,)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        return [self._value(*pair) for pair in zip(completions, columns[self.settings.answer], strict=True)]

    def _value(self, completion: str, answer: Any) -> float | None:
        if answer is None:
            return None
        if self.settings.find:
            found = [match[min(1, match.re.groups)] or "" for match in re.finditer(self.settings.find, completion)]
            completion = found[-1] if found else ""
        answers = answer if isinstance(answer, list | tuple) else [answer]
        return float(self._plain(completion) in {self._plain(str(right)) for right in answers})

    def _plain(self, text: str) -> str:
        text = unicodedata.normalize("NFKC", after_mark(text, self.settings.after))
        if self.settings.ignore_case:
            text = text.casefold()
        if self.settings.ignore_punctuation:
            text = text.translate(_NO_PUNCTUATION)
        return " ".join(text.split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def after_mark(text: str, mark: str) -> str:
    """What follows the last mark; the whole text where there is none."""
    return text.rpartition(mark)[2] if mark else text
