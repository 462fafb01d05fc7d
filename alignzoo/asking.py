"""Questions to a language model behind an address: the settings of who is asked, and templates. It imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any

from alignzoo.address import Address, Answer
from alignzoo.errors import PluginError
from alignzoo.schema import setting

REQUIRED: Any = MISSING
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Asking:
    """Who is asked, and how."""

    url: str = setting(REQUIRED, "address up to /chat/completions, e.g. http://127.0.0.1:8000/v1")
    model: str = setting(REQUIRED, "the model's name there")
    api_key_env: str | None = setting(None, "name of the environment variable that holds the key")
    temperature: float = setting(0.0, "0: the most probable answer", ge=0)
    max_tokens: int = setting(512, "longest answer of the judge", ge=1)
    concurrency: int = setting(8, "requests at the same time, on each rank", ge=1)
    retries: int = setting(3, "further tries of a request that failed in a way that may pass", ge=0)
    seconds: float = setting(30.0, "time for one request", gt=0)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url = {self.url!r} does not begin with http:// or https://")

    def check_key(self) -> None:
        """Raises PluginError where the variable that is to hold the key is not set."""
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise PluginError(
                f"the environment variable {self.api_key_env} is not set", fix=f"export {self.api_key_env}=..."
            )

    async def ask(
        self,
        questions: Sequence[str],
        told: Callable[[int, Answer | Exception], object] = lambda _number, _answer: None,
    ) -> list[Answer | Exception]:
        """What is answered to each question, or why it was not after its last try; told: as in Address.ask."""
        address = Address(self.url, self.model, self.api_key_env, self.concurrency, self.retries, self.seconds)
        conversations = [[{"role": "user", "content": question}] for question in questions]
        return await address.ask(conversations, told, temperature=self.temperature, max_tokens=self.max_tokens)


def fields_of(template: str) -> set[str]:
    """The names in braces. Braces that hold no name mean nothing: prompts show JSON."""
    return set(_FIELD.findall(template))


def filled(template: str, values: Mapping[str, str]) -> str:
    """With a value for each field. What is filled in is not looked at again."""
    return _FIELD.sub(lambda field: values[field[1]], template)


def as_text(prompt: Any) -> str:
    """A prompt as a judge reads it: a conversation with a line of the role above each turn."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}:\n{turn['content']}" for turn in prompt)
