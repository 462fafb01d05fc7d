"""Tasks of reasoning-gym, scored by their own scorers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import alignzoo
from alignzoo.errors import PluginError


@dataclass(frozen=True)
class Settings:
    tag: str = alignzoo.setting(
        "answer", "name of the tags around the answer, whose last pair counts; empty: the whole text is the answer"
    )


class ReasoningGym(alignzoo.Reward):
    """The score that reasoning-gym's own scorer gives; 0 to 1. It needs the extra gym.

    The rows have the columns of reasoning-gym's entries: `question`, `answer`, and `metadata` (a table, or JSON) with
    the name of the task in `source_dataset`. A completion without the tags has no answer: the scorers give
    it 0 or little.
    """

    name = "reasoning_gym"
    Settings = Settings
    columns = ("question", "answer", "metadata")

    def __init__(self, settings: Any = None, /, **values: Any) -> None:
        super().__init__(settings, **values)
        if importlib.util.find_spec("reasoning_gym") is None:
            raise PluginError("the package reasoning-gym is not installed", fix="pip install 'alignzoo[gym]'")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        rows = zip(completions, *(columns[name] for name in self.columns), strict=True)
        return [self._value(*row) for row in rows]

    def _value(self, completion: str, question: Any, answer: Any, metadata: Any) -> float:
        from reasoning_gym import get_score_answer_fn
        from reasoning_gym.utils import extract_answer

        table = json.loads(metadata) if isinstance(metadata, str) else metadata
        given = extract_answer(completion, self.settings.tag) if self.settings.tag else completion
        entry = {"question": question, "answer": answer, "metadata": table}
        return float(get_score_answer_fn(table["source_dataset"])(answer=given, entry=entry))
