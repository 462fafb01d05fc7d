"""Formats of rows: which columns make which kind of data. A new format is one function and one entry of FORMATS.

A format's `convert` takes a row with our column names, gives an Example, and raises BadRow. Where no format is named
in the recipe, the first of FORMATS whose columns are all there is taken, so the most specific come first.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignzoo.data.rows import BadRow, Example, Message, Messages, Turns, describe
from alignzoo.errors import DataError
from alignzoo.schema import nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
_FLOAT32_MAX = 3.4028234e38
_OTHER_NAMES = {  # what other people call our columns: for suggestions only, nothing is mapped unasked
    "prompt": ("question", "instruction", "query", "input", "context", "problem"),
    "completion": ("answer", "response", "output", "target", "solution"),
    "chosen": ("preferred", "accepted", "winner", "good", "better", "positive"),
    "rejected": ("dispreferred", "loser", "bad", "worse", "negative"),
    "messages": ("conversations", "conversation", "dialogue", "turns"),
    "label": ("is_good", "desirable", "labels"),
}


@dataclass(frozen=True)
class Format:
    """A shape of rows."""

    name: str
    kind: str  # demonstrations, pairs or labelled
    columns: tuple[str, ...]  # all of them must be there
    description: str
    convert: Callable[[Mapping[str, Any]], Example]


# --- values


def _value(row: Mapping[str, Any], column: str) -> Any:
    value = row.get(column)
    if value is None:
        raise BadRow("missing-column", f'column "{column}" is {"null" if column in row else "missing"}')
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow("not-text", f"{name} is {describe(value)}, not text")
    if not is_unicode(value):
        raise BadRow("not-unicode", f"{name} holds half a surrogate pair, which no tokenizer takes")
    return value


def is_unicode(text: str) -> bool:
    """False for text with a lone surrogate, as JSON's \\ud800 makes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _turns(row: Mapping[str, Any], column: str) -> Turns:
    value = _value(row, column)
    return _conversation(row, column) if isinstance(value, list | tuple) else _text(value, f'column "{column}"')


def _conversation(row: Mapping[str, Any], column: str) -> Messages:
    value = _value(row, column)
    if not isinstance(value, list | tuple):
        raise BadRow("not-text", f'column "{column}" is {describe(value)}, not a list of messages')
    return tuple(_message(message, f'column "{column}", message {i}') for i, message in enumerate(value, start=1))


def _message(message: Any, name: str) -> Message:
    """A message with a known role and text; keys that are null are left out, others go to the template as they are."""
    if not isinstance(message, Mapping):
        raise BadRow("not-text", f"{name} is {describe(message)}, not a message with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        found = f'role "{role}"{nearest(role, ROLES)}' if isinstance(role, str) else f"role is {describe(role)}"
        raise BadRow("unknown-role", f"{name}: {found}; known are {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    kept = {key: value for key, value in message.items() if isinstance(key, str) and value is not None}
    return {**kept, "role": role, "content": _text(content, f"the content of {name}")}


def _completion(turns: Turns, name: str) -> Turns:
    """Checks that there is something to learn, and that the assistant says it."""
    if isinstance(turns, str):
        if not turns.strip():
            raise BadRow("empty-completion", f"{name} is empty")
        return turns
    if not any(message["content"].strip() or message.get("tool_calls") for message in turns):
        raise BadRow("empty-completion", f"{name} is empty")
    others = [message["role"] for message in turns if message["role"] != "assistant"]
    if others:
        raise BadRow("not-assistant", f'{name} holds a "{others[0]}" turn; only assistant turns can be learned')
    return turns


def _same_shape(prompt: Turns, completions: Sequence[Turns]) -> tuple[Turns, tuple[Turns, ...]]:
    """All text, or all messages: where one is a list of messages, text becomes a turn."""
    if all(isinstance(turns, str) for turns in (prompt, *completions)):
        return prompt, tuple(completions)
    return _as_messages(prompt, "user"), tuple(_as_messages(c, "assistant") for c in completions)


def _as_messages(turns: Turns, role: str) -> Messages:
    return ({"role": role, "content": turns},) if isinstance(turns, str) else turns


def _trailing_assistant(messages: Messages) -> int:
    """Where the assistant turns at the end begin."""
    start = len(messages)
    while start and messages[start - 1]["role"] == "assistant":
        start -= 1
    if start == len(messages):
        last = f"its last turn is the {messages[-1]['role']}'s" if messages else "it has no turns"
        raise BadRow("no-assistant-turn", f"the conversation does not end with an assistant turn: {last}")
    return start


# --- formats


def _pairs(row: Mapping[str, Any]) -> Example:
    chosen, rejected = _turns(row, "chosen"), _turns(row, "rejected")
    prompt = _turns(row, "prompt")
    whole = [side for side in (chosen, rejected) if not isinstance(side, str) and side and _begins_earlier(side)]
    if isinstance(prompt, str) and len(whole) == 2:  # a text prompt beside two whole conversations that hold it
        return _pairs_implicit(row)
    return _pair(prompt, chosen, rejected)


def _begins_earlier(messages: Messages) -> bool:
    return bool(messages[0]["role"] != "assistant")


def _pairs_implicit(row: Mapping[str, Any]) -> Example:
    if isinstance(row.get("chosen"), str) or isinstance(row.get("rejected"), str):
        raise BadRow("no-prompt", 'chosen or rejected is text and there is no column "prompt"')
    chosen, rejected = _conversation(row, "chosen"), _conversation(row, "rejected")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected) and shared:
        raise BadRow("chosen-equals-rejected")
    return _pair(chosen[:shared], chosen[shared:], rejected[shared:])


def _pair(prompt: Turns, chosen: Turns, rejected: Turns) -> Example:
    sides = (_completion(chosen, "chosen"), _completion(rejected, "rejected"))
    prompt, completions = _same_shape(prompt, sides)
    if completions[0] == completions[1]:
        raise BadRow("chosen-equals-rejected")
    return Example("pairs", prompt, completions)


def _prompt_completion(row: Mapping[str, Any]) -> Example:
    completion = _completion(_turns(row, "completion"), "completion")
    prompt, completions = _same_shape(_turns(row, "prompt"), [completion])
    return Example("demonstrations", prompt, completions)


def _messages(row: Mapping[str, Any]) -> Example:
    messages = _conversation(row, "messages")
    start = _trailing_assistant(messages)
    return Example("demonstrations", messages[:start], (_completion(messages[start:], "the assistant's last turn"),))


def _labelled(row: Mapping[str, Any]) -> Example:
    return _with_label(_prompt_completion(row), row)


def _labelled_messages(row: Mapping[str, Any]) -> Example:
    return _with_label(_messages(row), row)


_LABELS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}  # 1 == True, 0 == False


def _with_label(example: Example, row: Mapping[str, Any]) -> Example:
    value = _value(row, "label")
    key = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(key, str | bool | int | float) or key not in _LABELS:
        raise BadRow("label-not-bool", f'column "label" is {_short(value)}: true or false is wanted')
    return Example("labelled", example.prompt, example.completions, label=_LABELS[key])


FORMATS = (
    Format(
        "labelled", "labelled", ("prompt", "completion", "label"),
        "prompt and completion as text or message lists; label true (desirable) or false", _labelled,
    ),
    Format(
        "labelled_messages", "labelled", ("messages", "label"),
        "a conversation; label true or false is that of the assistant turn(s) at its end", _labelled_messages,
    ),
    Format(
        "pairs", "pairs", ("prompt", "chosen", "rejected"),
        "prompt, chosen and rejected as text or message lists", _pairs,
    ),
    Format(
        "pairs_implicit", "pairs", ("chosen", "rejected"),
        "two conversations as message lists; the beginning that they share is the prompt", _pairs_implicit,
    ),
    Format(
        "prompt_completion", "demonstrations", ("prompt", "completion"),
        "prompt and completion as text or message lists", _prompt_completion,
    ),
    Format(
        "messages", "demonstrations", ("messages",),
        "a conversation; the assistant turn(s) at its end are learned, all before them is the prompt", _messages,
    ),
)  # fmt: skip


# --- finding the format


def detect(found: Sequence[str], name: str, source: str) -> Format:
    """The format of rows with these columns. name: "auto", or the one that the recipe names. Raises DataError."""
    if name != "auto":
        return _named(found, name, source)
    for known in FORMATS:
        if set(known.columns) <= set(found):
            return known
    raise DataError(
        f"{source}: no known format has the columns {_listed(found)}",
        why="known are " + "; ".join(f"{f.name} ({', '.join(f.columns)})" for f in FORMATS),
        fix=_suggest(FORMATS, found),
    )


def _named(found: Sequence[str], name: str, source: str) -> Format:
    by_name = {known.name: known for known in FORMATS}
    if name not in by_name:
        raise DataError(
            f'{source}: unknown format "{name}"{nearest(name, by_name)}', why=f"known are {', '.join(by_name)}"
        )
    chosen = by_name[name]
    missing = [column for column in chosen.columns if column not in found]
    if missing:
        raise DataError(
            f'{source}: format "{name}" needs {", ".join(chosen.columns)}; missing: {", ".join(missing)}',
            why=f"columns found: {_listed(found)}",
            fix=_suggest([chosen], found),
        )
    return chosen


def _listed(columns: Sequence[str]) -> str:
    more = f" and {len(columns) - 20} more" if len(columns) > 20 else ""
    return ", ".join(columns[:20]) + more if columns else "(none)"


def _suggest(formats: Iterable[Format], found: Sequence[str]) -> str:
    """A data.columns line for the format that the columns are nearest to."""
    best: dict[str, str] = {}
    rank = (-1.0, 0)
    for known in formats:
        mapping = {column: guess for column in known.columns if (guess := _guess(column, found))}
        score = (len(mapping) / len(known.columns), len(mapping))
        if mapping and score > rank:
            best, rank = {ours: theirs for ours, theirs in mapping.items() if ours != theirs}, score
    if not best:
        return 'map columns with data.columns, for example {prompt = "question", completion = "answer"}'
    pairs = ", ".join(f"{ours} = {_toml(theirs)}" for ours, theirs in best.items())
    return f"map columns if these are meant: data.columns = {{{pairs}}}"


def _guess(column: str, found: Sequence[str]) -> str:
    if column in found:
        return column
    lowered = {name.lower(): name for name in reversed(found)}
    for other in _OTHER_NAMES.get(column, ()):
        if other in lowered:
            return lowered[other]
    close = difflib.get_close_matches(column, lowered, n=1, cutoff=0.75)
    return lowered[close[0]] if close else ""


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _short(value: Any) -> str:
    shown = repr(value)[:40] if isinstance(value, str | int | float) else describe(value)
    return shown or "empty"


# --- columns of the recipe


def rename(row: Mapping[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """The row under our names: ours = theirs. A column that was renamed is gone under its old name."""
    theirs = set(mapping.values())
    kept = {key: value for key, value in row.items() if key not in theirs}
    return {**kept, **{ours: row[name] for ours, name in mapping.items() if name in row}}


def check_mapping(found: Sequence[str], mapping: Mapping[str, str], source: str) -> None:
    """Raises DataError where data.columns names a column that the file does not have."""
    for ours, theirs in mapping.items():
        if theirs not in found:
            raise DataError(
                f'{source}: data.columns maps {ours} = "{theirs}", and there is no column "{theirs}"'
                f"{nearest(theirs, found)}",
                why=f"columns found: {_listed(found)}",
            )


def check_keep(found: Sequence[str], keep: Sequence[str], source: str) -> None:
    """Raises DataError where no row has a column of data.keep."""
    for column in keep:
        if column not in found:
            raise DataError(
                f'{source}: data.keep names "{column}", and there is no such column{nearest(column, found)}',
                why=f"columns found: {_listed(found)}",
            )


def numbers(row: Mapping[str, Any], keep: Sequence[str]) -> dict[str, float]:
    """The columns of data.keep. true and false count as 1 and 0; numbers may be written as text, as in CSV."""
    return {column: _number(_value(row, column), column) for column in keep}


def _number(value: Any, column: str) -> float:
    try:
        number = float(value) if isinstance(value, bool | int | float | str) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _FLOAT32_MAX:  # also refuses nan
        raise BadRow("keep-not-a-number", f'column "{column}" is {_short(value)}, not a finite number of 32 bits')
    return number
