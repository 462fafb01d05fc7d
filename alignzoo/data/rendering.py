"""Examples -> texts: through a chat template, or raw."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignzoo.data import tool_text
from alignzoo.data.rows import BadRow, Example, Message, Messages, Turns
from alignzoo.data.values import as_messages
from alignzoo.data.writing import Template, Texts, write
from alignzoo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Fitted:
    """Turns as the template can write them."""

    prompt: Messages
    completions: tuple[Messages, ...]
    tools: Sequence[Message]
    notes: tuple[str, ...]


def render(example: Example, template: Template, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """The texts of an example. Raises BadRow, and DataError where a conversation meets no template."""
    if template.chat and not example.raw:
        return _render_chat(example, template, tokenizer)
    if not isinstance(example.prompt, str):
        raise _needs_template(example.where, template)
    wholes = tuple(example.prompt + str(completion) for completion in example.completions)
    notes = ("no-eos",) if template.chat and tokenizer.eos_token_id is None else ()
    return Texts(example.prompt, wholes, raw=True, notes=notes)


def render_prompt(
    prompt: Turns, template: Template, tokenizer: PreTrainedTokenizerBase, system: str | None = None
) -> str:
    """A prompt as text, ready to be continued; the same as in training. system: takes the place of data.system.

    Raises BadRow and DataError as `render` does.
    """
    if template.chat:
        fitted = _fit(prompt, (), (), template, template.system if system is None else system)
        return write(fitted.prompt, template, tokenizer, generation=True, tools=fitted.tools)
    if not isinstance(prompt, str):
        raise _needs_template("a prompt", template)
    return prompt


def _needs_template(name: str, template: Template) -> DataError:
    return DataError(
        f"{name}: a conversation, and there is no chat template to write it with",
        why=template.name,
        fix='set data.chat_template to a bundled name such as "chatml", or to a jinja file, or to "auto" for a '
        "tokenizer that has a template",
    )


def _render_chat(example: Example, template: Template, tokenizer: PreTrainedTokenizerBase) -> Texts:
    completions = tuple(as_messages(completion, "assistant") for completion in example.completions)
    fitted = _fit(example.prompt, completions, example.tools, template, template.system)
    if not fitted.prompt:
        raise BadRow("no-prompt", "the conversation begins with the assistant, and a chat template needs a turn before")

    def text(turns: Messages, generation: bool) -> str:
        return write(turns, template, tokenizer, generation=generation, tools=fitted.tools)

    prompt = text(fitted.prompt, True)
    conversations = [(*fitted.prompt, *completion) for completion in fitted.completions]
    wholes = tuple(text(turns, False) for turns in conversations)
    prefixes = [_check_prefix(prompt, whole, fitted.prompt) for whole in wholes]
    cuts: list[tuple[str, str]] = []
    same = True
    for end, start in _gaps(fitted.completions, len(fitted.prompt)):
        turns, whole = conversations[0], wholes[0]
        cuts.append((text(turns[:end], False), text(turns[:start], True)))
        same = _check_turn(cuts[-1][0], whole, turns[:end]) and same
        prefixes.append(_check_prefix(cuts[-1][1], whole, turns[:start]))
    closed = all(whole.rstrip().endswith(template.ends) for whole in wholes)
    notes = (*fitted.notes, *_changed(conversations, wholes), *(() if same else ("other-end",)))
    return Texts(prompt, wholes, all(prefixes), closed, cuts=tuple(cuts), notes=notes)


def _gaps(completions: Sequence[Messages], start: int) -> Iterator[tuple[int, int]]:
    """Where learned turns end and the next ones begin, as places in the conversation. start: of the completion."""
    learned = [turn["role"] == "assistant" for turn in completions[0]] if completions else []
    end = 0
    for i in range(1, len(learned)):
        if learned[i - 1] and not learned[i]:
            end = i
        elif learned[i] and not learned[i - 1]:
            yield start + end, start + i


# --- turns as the template takes them


def _fit(
    prompt: Turns, completions: tuple[Messages, ...], tools: Sequence[Message], template: Template, system: str | None
) -> _Fitted:
    turns, notes, does = as_messages(prompt, "user"), [], template.does
    if system is not None and not _has_system(turns):
        turns = ({"role": "system", "content": system}, *turns)
    if tools and not does.tools:
        turns, tools = tool_text.introduced(turns, tools), ()
        notes.append("tools-as-text")
    if does.calls != "object" and any(map(tool_text.has_calls, (turns, *completions))):
        rewrite = tool_text.with_json_arguments if does.calls else tool_text.as_text
        turns, completions = rewrite(turns), tuple(map(rewrite, completions))
        notes.append("" if does.calls else "calls-as-text")
    if not does.developer and any(turn["role"] == "developer" for turn in turns):
        turns = tuple({**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in turns)
        notes.append("developer-as-system")
    if not does.system and turns and turns[0]["role"] == "system":
        turns = _merged(turns)
        notes.append("system-merged")
    return _Fitted(turns, completions, tools, tuple(filter(None, notes)))


def _has_system(turns: Messages) -> bool:
    return bool(turns) and turns[0]["role"] in ("system", "developer")


def _merged(turns: Messages) -> Messages:
    """The system text at the start of the first user turn, or as a user turn where there is none."""
    system, *rest = turns
    text = system["content"].strip()
    for i, turn in enumerate(rest):
        if turn["role"] == "user":
            merged = {**turn, "content": f"{text}\n\n{turn['content']}" if text else turn["content"]}
            return (*rest[:i], merged, *rest[i + 1 :])
    return ({**system, "role": "user"}, *rest) if text else tuple(rest)


# --- what the template made of them


def _changed(conversations: Sequence[Messages], wholes: Sequence[str]) -> tuple[str, ...]:
    kept = all(
        turn["content"].strip() in whole
        for turns, whole in zip(conversations, wholes, strict=True)
        for turn in turns
        if turn["role"] != "tool"  # results may be written as JSON
    )
    return () if kept else ("text-changed",)


def _check_prefix(prompt: str, whole: str, turns: Messages) -> bool:
    """True where whole begins with prompt. Else the end of the last turn must lie in what they share."""
    if whole.startswith(prompt):
        return True
    shared = _shared(prompt, whole)
    if _end_of_last(prompt, [turn for turn in turns if turn["role"] != "assistant"]) > shared:
        raise BadRow(
            "prompt-not-prefix",
            "the chat template writes the prompt in another way when a completion follows: "
            f"{_shown(prompt, shared)} alone, {_shown(whole, shared)} with it",
        )
    return False


def _check_turn(ended: str, whole: str, turns: Messages) -> bool:
    """True where whole begins with a text that ends with an assistant turn. Else it must share what is said in it."""
    if whole.startswith(ended.rstrip()):
        return True
    shared = _shared(ended, whole)
    if turns[-1].get("tool_calls") or _end_of_last(ended, turns[-1:]) > shared:
        raise BadRow(
            "turn-rewritten",
            "the chat template writes an assistant turn in another way when later turns follow: "
            f"{_shown(ended, shared)} as the last, {_shown(whole, shared)} before others; "
            'data.train_on = "last" learns the last turn only',
        )
    return False


def _shared(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _shown(text: str, place: int) -> str:
    return repr(text[max(0, place - 40) : place + 60])


def _end_of_last(text: str, turns: Sequence[Message]) -> int:
    """Where the content of the last turn that is found in a text ends; past its end where none is."""
    for turn in reversed(turns):
        content = turn["content"].strip()
        for written in (content, json.dumps(content, ensure_ascii=False)[1:-1]) if content else ():
            if (start := text.rfind(written)) >= 0:
                return start + len(written)
    return len(text) + 1
