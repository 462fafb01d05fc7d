"""A language model as a judge, over an address that speaks OpenAI's protocol."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Any

import alignzoo
from alignzoo.address import Address, Answer
from alignzoo.errors import PluginError

REQUIRED: Any = MISSING
PROMPT = """Rate the answer to the question on a scale from 0 to 10, 10 being the best.

Question:
{prompt}

Answer:
{completion}

End with one line: Score: <number>"""


@dataclass(frozen=True)
class Settings:
    url: str = alignzoo.setting(REQUIRED, "address up to /chat/completions, e.g. http://127.0.0.1:8000/v1")
    model: str = alignzoo.setting(REQUIRED, "the model's name there")
    api_key_env: str | None = alignzoo.setting(None, "name of the environment variable that holds the key")
    prompt: str | None = alignzoo.setting(
        None,
        "what the judge is asked, with {prompt}, {completion} and columns by name, e.g. {answer}, filled in; "
        "a mark from 0 to 10 if not given",
    )
    score: str = alignzoo.setting(
        r"Score:\s*(-?\d+(?:\.\d+)?)", "regular expression; the first group of its last match is the value"
    )
    scale: float = alignzoo.setting(0.1, "what the value is multiplied by")
    temperature: float = alignzoo.setting(0.0, "0: the most probable answer", ge=0)
    max_tokens: int = alignzoo.setting(512, "longest answer of the judge", ge=1)
    concurrency: int = alignzoo.setting(8, "requests at the same time, on each rank", ge=1)
    retries: int = alignzoo.setting(3, "further tries of a request that failed in a way that may pass", ge=0)
    seconds: float = alignzoo.setting(30.0, "time for one request", gt=0)

    def __post_init__(self) -> None:
        try:
            groups = re.compile(self.score).groups
        except re.error as error:
            raise ValueError(f"score = {self.score!r} is no regular expression: {error}") from error
        if groups < 1:
            raise ValueError(f"score = {self.score!r} has no group: put the number into parentheses")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url = {self.url!r} does not begin with http:// or https://")


class Judge(alignzoo.Reward):
    """The number that a judge gives, read by a regular expression, times `scale`.

    An answer without a number, and a request that failed to its last try, count as failed. The key is read from the
    environment, sent to `url` only, and written nowhere.
    """

    name = "judge"
    Settings = Settings

    def __init__(self, settings: Any = None, /, **values: Any) -> None:
        super().__init__(settings, **values)
        variable = self.settings.api_key_env
        if variable is not None and not os.environ.get(variable):
            raise PluginError(f"the environment variable {variable} is not set", fix=f"export {variable}=...")

    @property
    def _prompt(self) -> str:
        return self.settings.prompt or PROMPT

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(sorted(set(_FIELD.findall(self._prompt)) - {"prompt", "completion"}))

    async def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | Exception | None]:
        s = self.settings
        address = Address(s.url, s.model, s.api_key_env, s.concurrency, s.retries, s.seconds)
        questions = [
            _filled(self._prompt, {"prompt": _text(prompt), "completion": completion, **row})
            for prompt, completion, row in zip(prompts, completions, _rows(columns, len(prompts)), strict=True)
        ]
        asked = [[{"role": "user", "content": question}] for question in questions]
        answers = await address.ask(asked, temperature=s.temperature, max_tokens=s.max_tokens)
        return [self._value(answer) for answer in answers]

    def _value(self, answer: Answer | Exception) -> float | Exception:
        if isinstance(answer, Exception):
            return answer
        found = re.findall(self.settings.score, answer.text)
        last = found[-1] if found else ""
        try:
            return float(last[0] if isinstance(last, tuple) else last) * float(self.settings.scale)
        except ValueError:
            return ValueError(f"no score in the judge's answer: {answer.text[-100:]!r}")


_FIELD = re.compile(r"\{(\w+)\}")


def _filled(template: str, values: dict[str, str]) -> str:
    """Braces that hold no name stay: prompts show JSON. What is filled in is not looked at again."""
    return _FIELD.sub(lambda field: values[field[1]], template)


def _rows(columns: dict[str, Sequence[Any]], n: int) -> list[dict[str, str]]:
    return [{name: str(values[i]) for name, values in columns.items()} for i in range(n)]


def _text(prompt: Any) -> str:
    """A prompt as the judge reads it: a conversation with a line of the role above each turn."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}:\n{turn['content']}" for turn in prompt)
