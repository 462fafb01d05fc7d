"""Examples -> texts: through a chat template, or raw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignzoo.data.formats import is_unicode
from alignzoo.data.rows import BadRow, Example, Messages, Turns
from alignzoo.data.sources import display
from alignzoo.errors import DataError
from alignzoo.recipe import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OURS = ("tokenize", "add_generation_prompt", "continue_final_message", "chat_template", "return_dict", "tools")

_RAW = "raw text, prompt and completion joined as they are, then EOS"


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


@dataclass(frozen=True, slots=True)
class Texts:
    """An example as text. Each whole is the prompt with one completion."""

    prompt: str
    wholes: tuple[str, ...]
    prefix: bool = True  # False: a whole does not begin with all of the prompt
    closed: bool = True  # False: a rendered conversation does not end with a special token


def choose_template(data: Data, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that data.chat_template asks for. Raises DataError where there is none of that name."""
    clash = sorted(set(data.chat_template_kwargs) & set(_OURS))
    if clash:
        raise DataError(f"data.chat_template_kwargs holds {', '.join(clash)}", why="alignzoo sets these itself")
    if data.chat_template == "none":
        return Template(
            "raw text, prompt and completion joined as they are, then EOS (data.chat_template = none)", False
        )
    if data.chat_template != "auto":
        path = Path(data.chat_template).expanduser()
        return _chat(data, tokenizer, _read(path, data.chat_template), f"the chat template {display(path)}")
    if not getattr(tokenizer, "chat_template", None):
        return Template(f"{_RAW} (the tokenizer has no chat template)", False)
    return _chat(data, tokenizer, None, "the tokenizer's chat template")


def _read(path: Path, value: str) -> str:
    if not path.is_file():
        raise DataError(
            f'data.chat_template = "{value}" is neither "auto" nor "none" nor a file',
            fix="give the path of a jinja file; relative paths start at the recipe's folder",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{display(path)}: the chat template cannot be read", why=str(error)) from error
    if not text.strip():
        raise DataError(f"{display(path)}: the chat template is empty")
    return text


def _chat(data: Data, tokenizer: PreTrainedTokenizerBase, text: str | None, source: str) -> Template:
    return Template(
        _words(source, data), True, text, data.chat_template_kwargs, data.system, source, _special_texts(tokenizer)
    )


def _words(name: str, data: Data) -> str:
    system = ", data.system before it" if data.system is not None else ""
    options = f", {dict(data.chat_template_kwargs)}" if data.chat_template_kwargs else ""
    return f"{name} (a text prompt is a user turn{system}, a text completion the assistant's turn{options})"


def render(example: Example, template: Template, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """The texts of an example. Raises BadRow, and DataError where a conversation meets no template."""
    if template.chat:
        return _render_chat(example, template, tokenizer)
    if not isinstance(example.prompt, str):
        raise _needs_template(example.where, template)
    return Texts(example.prompt, tuple(example.prompt + str(completion) for completion in example.completions))


def render_prompt(
    prompt: Turns, template: Template, tokenizer: PreTrainedTokenizerBase, system: str | None = None
) -> str:
    """A prompt as text, ready to be continued; the same as in training. system: takes the place of data.system.

    Raises BadRow and DataError as `render` does.
    """
    if template.chat:
        turns = _turns(prompt, template.system if system is None else system)
        return _apply(turns, template, tokenizer, generation=True)
    if not isinstance(prompt, str):
        raise _needs_template("a prompt", template)
    return prompt


def _needs_template(name: str, template: Template) -> DataError:
    return DataError(
        f"{name}: a conversation, and there is no chat template to write it with",
        why=template.name,
        fix='set data.chat_template to a jinja file, or to "auto" for a tokenizer that has a template',
    )


def _render_chat(example: Example, template: Template, tokenizer: PreTrainedTokenizerBase) -> Texts:
    turns = _turns(example.prompt, template.system)
    if not turns:
        raise BadRow("no-prompt", "the conversation begins with the assistant, and a chat template needs a turn before")
    prompt = _apply(turns, template, tokenizer, generation=True)
    wholes = tuple(
        _apply((*turns, *_assistant(completion)), template, tokenizer, generation=False)
        for completion in example.completions
    )
    prefixes = [_check_prefix(prompt, whole, turns) for whole in wholes]
    closed = all(whole.rstrip().endswith(template.ends) for whole in wholes)
    return Texts(prompt, wholes, all(prefixes), closed)


def _turns(prompt: Turns, system: str | None) -> Messages:
    turns: Messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    has_system = bool(turns) and turns[0]["role"] in ("system", "developer")
    return turns if system is None or has_system else ({"role": "system", "content": system}, *turns)


def _assistant(completion: Turns) -> Messages:
    return ({"role": "assistant", "content": completion},) if isinstance(completion, str) else completion


def _apply(turns: Messages, template: Template, tokenizer: PreTrainedTokenizerBase, *, generation: bool) -> str:
    from jinja2 import TemplateSyntaxError

    try:
        text = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], chat_template=template.text, tokenize=False,
            add_generation_prompt=generation, **template.kwargs,
        )  # fmt: skip
    except TemplateSyntaxError as error:
        raise DataError(f"{template.source}, line {error.lineno}: not a jinja template: {error.message}") from error
    except Exception as error:  # a template is a program of its own: anything may come out of it
        raise BadRow(
            "template-error", f"the chat template refused it: {type(error).__name__}: {error}"[:300]
        ) from error
    if not is_unicode(text):
        raise BadRow("not-unicode")
    return str(text)


def _check_prefix(prompt: str, whole: str, turns: Messages) -> bool:
    """True where whole begins with prompt. Else the end of the last user turn must lie in what they share."""
    if whole.startswith(prompt):
        return True
    shared = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
    last = next((turn["content"].strip() for turn in reversed(turns) if turn["role"] == "user"), "")
    start = prompt.rfind(last) if last else -1
    if start < 0 or start + len(last) > shared:
        around = slice(max(0, shared - 40), shared + 60)
        raise BadRow(
            "prompt-not-prefix",
            "the chat template writes the prompt in another way when a completion follows: "
            f"{prompt[around]!r} alone, {whole[around]!r} with it",
        )
    return False


def _special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple({*added, *([tokenizer.eos_token] if tokenizer.eos_token else [])})
