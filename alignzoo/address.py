"""Chat completions from an address that speaks OpenAI's protocol, asked again where that may help; no torch."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

AGAIN = {408, 409, 429, 500, 502, 503, 504}  # what a later try may mend


@dataclass(frozen=True)
class Answer:
    """What was said, and whether it broke off at its longest length."""

    text: str
    truncated: bool


@dataclass(frozen=True)
class Address:
    """Where to ask, and how patiently. The key is read from the environment, sent to `url` only, written nowhere."""

    url: str  # up to /chat/completions
    model: str
    api_key_env: str | None = None
    concurrency: int = 8  # requests at the same time
    retries: int = 3  # further tries of a request that failed in a way that may pass
    seconds: float = 30.0  # for one request

    async def ask(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        told: Callable[[int, Answer | Exception], object] = lambda _number, _answer: None,
        **options: Any,
    ) -> list[Answer | Exception]:
        """An answer to each list of messages, or why there is none.

        told: of each as it comes, with its number; what it raises ends all. options: go into every request.
        """
        import httpx2

        key = self._key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits, turn = httpx2.Limits(max_connections=self.concurrency), asyncio.Semaphore(self.concurrency)
        async with httpx2.AsyncClient(headers=headers, timeout=self.seconds, limits=limits) as client:

            async def one(number: int, messages: Sequence[Mapping[str, Any]]) -> Answer | Exception:
                body = {"model": self.model, "messages": [dict(m) for m in messages], **options}
                answer: Answer | Exception
                try:
                    async with turn:
                        answer = await self._answer(client, body)
                except Exception as error:  # this one has failed, the others need not
                    answer = error
                told(number, answer)
                return answer

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(*numbered)) for numbered in enumerate(conversations)]
            except ExceptionGroup as raised:  # by `told`: the others are given up
                raise raised.exceptions[0] from None
            return [task.result() for task in tasks]

    async def _answer(self, client: Any, body: Mapping[str, Any]) -> Answer:
        import httpx2

        for attempt in range(self.retries + 1):
            last = attempt == self.retries
            try:
                response = await client.post(f"{self.url.rstrip('/')}/chat/completions", json=body)
            except httpx2.TransportError:
                if last:
                    raise
            else:
                if response.status_code == 200:
                    choice = response.json()["choices"][0]
                    return Answer(str(choice["message"]["content"] or ""), choice.get("finish_reason") == "length")
                if last or response.status_code not in AGAIN:
                    text = self._without_key(response.text)
                    raise RuntimeError(f"{self.url} answered {response.status_code}: {text}")
            await asyncio.sleep(min(2.0**attempt * 0.5, 8.0))
        raise AssertionError("the last try returns or raises")

    @property
    def _key(self) -> str:
        return os.environ.get(self.api_key_env, "") if self.api_key_env else ""

    def _without_key(self, text: str) -> str:
        """The beginning of an error's text; some servers repeat the key there."""
        return (text.replace(self._key, "***") if self._key else text)[:200]
