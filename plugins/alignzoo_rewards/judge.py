"""A language model as a judge, over an address that speaks OpenAI's protocol."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import alignzoo
from alignzoo.address import Answer
from alignzoo.asking import Asking, as_text, fields_of, filled

PROMPT = """Rate the answer to the question on a scale from 0 to 10, 10 being the best.

Question:
{prompt}

Answer:
{completion}

End with one line: Score: <number>"""


@dataclass(frozen=True)
class Settings(Asking):
    prompt: str | None = alignzoo.setting(
        None,
        "what the judge is asked, with {prompt}, {completion} and columns by name, e.g. {answer}, filled in; "
        "a mark from 0 to 10 if not given",
    )
    score: str = alignzoo.setting(
        r"Score:\s*(-?\d+(?:\.\d+)?)", "regular expression; the first group of its last match is the value"
    )
    scale: float = alignzoo.setting(0.1, "what the value is multiplied by")

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            groups = re.compile(self.score).groups
        except re.error as error:
            raise ValueError(f"score = {self.score!r} is no regular expression: {error}") from error
        if groups < 1:
            raise ValueError(f"score = {self.score!r} has no group: put the number into parentheses")


class Judge(alignzoo.Reward):
    """The number that a judge gives, read by a regular expression, times `scale`.

    An answer without a number, and a request that failed to its last try, count as failed. The key is read from the
    environment, sent to `url` only, and written nowhere.
    """

    name = "judge"
    Settings = Settings

    def __init__(self, settings: Any = None, /, **values: Any) -> None:
        super().__init__(settings, **values)
        self.settings.check_key()

    @property
    def _prompt(self) -> str:
        return self.settings.prompt or PROMPT

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(sorted(fields_of(self._prompt) - {"prompt", "completion"}))

    async def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | Exception | None]:
        questions = [
            filled(self._prompt, {"prompt": as_text(prompt), "completion": completion, **row})
            for prompt, completion, row in zip(prompts, completions, _rows(columns, len(prompts)), strict=True)
        ]
        return [self._value(answer) for answer in await self.settings.ask(questions)]

    def _value(self, answer: Answer | Exception) -> float | Exception:
        if isinstance(answer, Exception):
            return answer
        found = re.findall(self.settings.score, answer.text)
        last = found[-1] if found else ""
        try:
            return float(last[0] if isinstance(last, tuple) else last) * float(self.settings.scale)
        except ValueError:
            return ValueError(f"no score in the judge's answer: {answer.text[-100:]!r}")


def _rows(columns: dict[str, Sequence[Any]], n: int) -> list[dict[str, str]]:
    return [{name: str(values[i]) for name, values in columns.items()} for i in range(n)]
