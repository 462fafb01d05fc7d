"""A chat template at work: what is known of it, what it makes of an example, and the one place where it is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from alignzoo.data.rows import BadRow, Message, Messages
from alignzoo.data.values import is_unicode
from alignzoo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Abilities:
    """What a chat template does, found by trying it."""

    system: bool = True  # writes system turns
    developer: bool = True  # writes developer turns
    tools: bool = False  # writes definitions of functions
    calls: str = ""  # writes calls and results, with arguments as "object" or as "text"; "": not at all
    parts: bool = False  # wants content as a list of parts
    own_system: str = ""  # the system text that it adds where there is none
    leftover: str = ""  # a generation prompt that it leaves after the last turn, unasked
    end: str = ""  # the special token that closes an assistant turn
    dated: bool = False  # writes the day on which it is used


@dataclass(frozen=True)
class Template:
    """How prompts and completions become text."""

    name: str  # in words, for the report
    chat: bool  # False: raw text, and conversations are refused
    text: str | None = None  # the template; None: the tokenizer's own
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    source: str = "the tokenizer's chat template"
    ends: tuple[str, ...] = ()  # special tokens, what a rendered conversation should end with
    does: Abilities = Abilities()


@dataclass(frozen=True, slots=True)
class Texts:
    """An example as text. Each whole is the prompt with one completion."""

    prompt: str
    wholes: tuple[str, ...]
    prefix: bool = True  # False: a whole does not begin with all of the prompt
    closed: bool = True  # False: a rendered conversation does not end with a special token
    raw: bool = False  # not from a template: the tokenizer's BOS and EOS are added
    cuts: tuple[
        tuple[str, str], ...
    ] = ()  # of the first whole: beginnings, the end of a learned turn, the next's start
    notes: tuple[str, ...] = ()  # keys of rows.NOTES

    @property
    def key(self) -> str:
        """What tells rows with another prompt apart; text without a prompt is its own."""
        return self.prompt or "\0".join(self.wholes)


def write(
    turns: Messages,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    generation: bool,
    tools: Sequence[Message] = (),
) -> str:
    """The text of a conversation. Raises BadRow, and DataError for what is no template at all."""
    from jinja2 import TemplateSyntaxError

    given = {"tools": [dict(tool) for tool in tools]} if tools else {}
    try:
        text = tokenizer.apply_chat_template(
            [_copied(turn, template.does.parts) for turn in turns], chat_template=template.text, tokenize=False,
            add_generation_prompt=generation, **given, **template.kwargs,
        )  # fmt: skip
    except TemplateSyntaxError as error:
        raise DataError(f"{template.source}, line {error.lineno}: not a jinja template: {error.message}") from error
    except Exception as error:  # a template is a program of its own: anything may come out of it
        raise BadRow(
            "template-error", f"the chat template refused it: {type(error).__name__}: {error}"[:300]
        ) from error
    if not is_unicode(text):
        raise BadRow("not-unicode")
    leftover = template.does.leftover
    return str(text) if generation or not leftover else str(text).removesuffix(leftover)


def _copied(turn: Message, parts: bool) -> dict[str, Any]:
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]} if parts else dict(turn)
