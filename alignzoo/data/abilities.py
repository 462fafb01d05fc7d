"""What a chat template does with system turns, tools and ends of turns, found by writing a few short conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from alignzoo.data.rows import BadRow, Message, Messages
from alignzoo.data.writing import Abilities, Template, write
from alignzoo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM, _USER, _ASSISTANT, _AGAIN = "Trial7system", "Trial7user", "Trial7assistant", "Trial7again"
_CALLED, _RESULT = "trial7function", "Trial7result"
_PARAMETERS = {"type": "object", "properties": {"of": {"type": "integer", "description": ""}}}
_TOOL: Message = {"type": "function", "function": {"name": _CALLED, "description": "", "parameters": _PARAMETERS}}
_ARGUMENTS = {"object": {"of": 7}, "text": '{"of": 7}'}


def find_abilities(template: Template, tokenizer: PreTrainedTokenizerBase) -> Abilities:
    """What the template does. Raises DataError where it is no template, or leaves what cannot be cut."""
    trial = _Trial(template, tokenizer)
    if trial.needs_parts():
        template = replace(template, does=Abilities(parts=True))
        trial = _Trial(template, tokenizer)
    return Abilities(
        system=trial.writes("system"),
        developer=trial.writes("developer"),
        tools=trial.writes_tools(),
        calls=next((form for form in _ARGUMENTS if trial.writes_calls(form)), ""),
        parts=template.does.parts,
        own_system=trial.own_system(),
        leftover=trial.leftover(),
        end=trial.end(),
        dated="strftime_now" in str(template.text or tokenizer.chat_template),
    )


class _Trial:
    """Conversations of words that stand in no template."""

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
        self.template, self.tokenizer = template, tokenizer
        self.alone = self.text(("user", _USER))
        self.answered = self.text(("user", _USER), ("assistant", _ASSISTANT))
        self.between, self.tail = _around(self.answered, _USER, _ASSISTANT)

    def text(self, *turns: tuple[str, str], generation: bool = False) -> str:
        """The text of a conversation; "" where the template refuses it."""
        return self.written(tuple({"role": role, "content": content} for role, content in turns), generation)

    def written(self, messages: Messages, generation: bool = False, tools: Sequence[Message] = ()) -> str:
        try:
            return write(messages, self.template, self.tokenizer, generation=generation, tools=tools)
        except BadRow:
            return ""

    def needs_parts(self) -> bool:
        if not self.alone or _USER in self.alone:
            return False
        parts = replace(self.template, does=Abilities(parts=True))
        return _USER in _Trial(parts, self.tokenizer).alone

    def writes(self, role: str) -> bool:
        """Whether turns of a role are written. A template that cannot even write the user's is left to the rows."""
        return _USER not in self.alone or _SYSTEM in self.text((role, _SYSTEM), ("user", _USER))

    def writes_tools(self) -> bool:
        return _CALLED in self.written(({"role": "user", "content": _USER},), tools=[_TOOL])

    def writes_calls(self, form: str) -> bool:
        """Whether a function call and its result are written. form: of the arguments."""
        call = {"id": "call00001", "type": "function", "function": {"name": _CALLED, "arguments": _ARGUMENTS[form]}}
        text = self.written(
            (
                {"role": "user", "content": _USER},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": _RESULT, "tool_call_id": "call00001", "name": _CALLED},
            )
        )
        return _CALLED in text and _RESULT in text

    def own_system(self) -> str:
        """What stands in the place of a system text where there is none."""
        before, found, after = self.text(("system", _SYSTEM), ("user", _USER)).partition(_SYSTEM)
        fits = found and self.alone.startswith(before) and self.alone.endswith(after)
        return self.alone[len(before) : len(self.alone) - len(after)].strip() if fits else ""

    def leftover(self) -> str:
        """What follows the end of the last turn unasked, where that is how an assistant's turn begins."""
        asked = self.text(("user", _USER), ("assistant", _ASSISTANT), generation=True)
        if asked != self.answered or not _shared_end(self.between.rstrip(), self.tail.rstrip()):
            return ""
        again = self.text(("user", _USER), ("assistant", _ASSISTANT), ("user", _AGAIN))
        following, _ = _around(again, _ASSISTANT, _AGAIN)
        if following.startswith(self.tail):
            return ""
        end = self.end()
        if not end:
            raise DataError(
                f"{self.template.source}: leaves a generation prompt after the last turn: {self.tail!r}",
                why="no special token before it shows where the turn ends",
                fix="give a template that writes it only where add_generation_prompt is true",
            )
        return self.tail.partition(end)[2]

    def end(self) -> str:
        """The first special token after an answer."""
        places = {self.tail.find(token): token for token in self.template.ends if token in self.tail}
        return places[min(places)] if places else ""


def _around(text: str, first: str, second: str) -> tuple[str, str]:
    """What stands between two words, and what after the second."""
    start, end = text.find(first), text.rfind(second)
    return (text[start + len(first) : end], text[end + len(second) :]) if 0 <= start < end else ("", "")


def _shared_end(a: str, b: str) -> str:
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return a[len(a) - n :]
