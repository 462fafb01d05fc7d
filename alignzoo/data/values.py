"""What rows hold: text, messages, labels, tools. All raise BadRow with the column's name for what they cannot take."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alignzoo.data.rows import BadRow, Message, Messages, Turns, describe
from alignzoo.schema import nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {  # of ShareGPT's turns
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "function_call": "call", "observation": "tool",
    "tool": "tool", "function_response": "tool",
}  # fmt: skip
LABELS: dict[Any, bool] = {  # 1 == True and 0 == False, so those stand for the numbers too
    True: True, "true": True, "1": True, "yes": True, "good": True, "desirable": True, "chosen": True,
    "thumbs_up": True, "thumbs up": True, "👍": True,
    False: False, "false": False, "0": False, "no": False, "bad": False, "undesirable": False, "rejected": False,
    "thumbs_down": False, "thumbs down": False, "👎": False,
}  # fmt: skip
_KNOWN_LABELS = " and ".join(
    f"{', '.join(str(key).lower() for key, good in LABELS.items() if good is side)} ({words})"
    for side, words in ((True, "desirable"), (False, "undesirable"))
)
_THUMB_VARIANTS = dict.fromkeys([0xFE0E, 0xFE0F, *range(0x1F3FB, 0x1F400)])  # emoji or text style, tones of skin


# --- text


def value(row: Mapping[str, Any], column: str) -> Any:
    """What stands in a column that must be there."""
    found = row.get(column)
    if found is None:
        raise BadRow("missing-column", f'column "{column}" is {"null" if column in row else "missing"}')
    return found


def text(found: Any, name: str) -> str:
    if not isinstance(found, str):
        raise BadRow("not-text", f"{name} is {describe(found)}, not text")
    if not is_unicode(found):
        raise BadRow("not-unicode", f"{name} holds half a surrogate pair, which no tokenizer takes")
    return found


def column_text(row: Mapping[str, Any], column: str) -> str:
    return text(value(row, column), f'column "{column}"')


def optional_text(row: Mapping[str, Any], column: str) -> str:
    """The text of a column that may be missing, null or empty."""
    found = row.get(column)
    return "" if found is None else text(found, f'column "{column}"')


def is_unicode(found: str) -> bool:
    """False for text with a lone surrogate, as JSON's \\ud800 makes."""
    try:
        found.encode()
    except UnicodeEncodeError:
        return False
    return True


def short(found: Any) -> str:
    """A value as messages show it."""
    shown = repr(found)[:40] if isinstance(found, str | int | float) else describe(found)
    return shown or "empty"


# --- messages


def turns(row: Mapping[str, Any], column: str) -> Turns:
    """Text, or a list of messages."""
    found = value(row, column)
    return conversation(row, column) if isinstance(found, list | tuple) else text(found, f'column "{column}"')


def conversation(row: Mapping[str, Any], column: str) -> Messages:
    found = value(row, column)
    if not isinstance(found, list | tuple):
        raise BadRow("not-text", f'column "{column}" is {describe(found)}, not a list of messages')
    return messages(found, f'column "{column}"')


def messages(found: Sequence[Any], name: str) -> Messages:
    said = tuple(message(one, f"{name}, message {i}") for i, one in enumerate(found, start=1))
    return numbered_calls(said) if any(_is_sharegpt(one) for one in found) else said


def message(found: Any, name: str) -> Message:
    """A message with a known role and text; keys that are null are left out, others go to the template as they are."""
    if not isinstance(found, Mapping):
        raise BadRow("not-text", f"{name} is {describe(found)}, not a message with role and content, or from and value")
    if _is_sharegpt(found):
        return _sharegpt(found, name)
    role, content, calls = found.get("role"), found.get("content"), found.get("tool_calls")
    if not isinstance(role, str) or role not in ROLES:
        raise unknown_role(role, name, ROLES)
    kept = {key: one for key, one in found.items() if isinstance(key, str) and one is not None}
    if calls:
        kept["tool_calls"] = tool_calls(calls, name)
    if content is None and calls:
        content = ""
    return {**kept, "role": role, "content": text(joined(content), f"the content of {name}")}


def _is_sharegpt(found: Any) -> bool:
    return isinstance(found, Mapping) and "from" in found and "role" not in found


def _sharegpt(found: Mapping[str, Any], name: str) -> Message:
    """A turn of from and value."""
    speaker = found["from"]
    role = SPEAKERS.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        raise unknown_role(speaker, name, SPEAKERS)
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": tool_calls(found.get("value"), name)}
    return {"role": role, "content": text(joined(found.get("value")), f"the value of {name}")}


def numbered_calls(turns: Messages) -> Messages:
    """Calls without an id get one, and the results that follow them refer to it: some chat templates ask for both."""
    numbered: list[Message] = []
    waiting: list[str] = []
    count = 0
    for turn in turns:
        if turn.get("tool_calls"):
            calls = [{"id": f"call{count + i:05d}", **call} for i, call in enumerate(turn["tool_calls"], start=1)]
            count += len(calls)
            waiting = [call["id"] for call in calls]
            numbered.append({**turn, "tool_calls": calls})
        elif turn["role"] == "tool" and waiting:
            numbered.append({**turn, "tool_call_id": waiting.pop(0)})
        else:
            numbered.append(turn)
    return tuple(numbered)


def unknown_role(role: Any, name: str, known: Iterable[str]) -> BadRow:
    known = list(known)
    found = f'role "{role}"{nearest(role, known)}' if isinstance(role, str) else f"role is {describe(role)}"
    return BadRow("unknown-role", f"{name}: {found}; known are {', '.join(known)}")


def joined(content: Any) -> Any:
    """Content in parts of type text as one text; all else as it is."""
    if not isinstance(content, list | tuple) or not content:
        return content
    parts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(content) else content


def as_messages(found: Turns, role: str) -> Messages:
    return ({"role": role, "content": found},) if isinstance(found, str) else found


def same_shape(prompt: Turns, completions: Sequence[Turns]) -> tuple[Turns, tuple[Turns, ...]]:
    """All text, or all messages: where one is a list of messages, text becomes a turn."""
    if all(isinstance(found, str) for found in (prompt, *completions)):
        return prompt, tuple(completions)
    return as_messages(prompt, "user"), tuple(as_messages(c, "assistant") for c in completions)


def completion(found: Turns, name: str) -> Turns:
    """Checks that there is something to learn, and that the assistant says all of it."""
    if not says_something(found):
        raise BadRow("empty-completion", f"{name} is empty")
    others = [] if isinstance(found, str) else [one["role"] for one in found if one["role"] != "assistant"]
    if others:
        raise BadRow("not-assistant", f'{name} holds a "{others[0]}" turn; only assistant turns can be learned')
    return found


def says_something(found: Turns) -> bool:
    if isinstance(found, str):
        return bool(found.strip())
    return any(one["content"].strip() or one.get("tool_calls") for one in found)


def begin_of_last_answer(messages: Messages) -> int:
    """Where the assistant turns at the end begin."""
    start = len(messages)
    while start and messages[start - 1]["role"] == "assistant":
        start -= 1
    if start == len(messages):
        last = f"its last turn is the {messages[-1]['role']}'s" if messages else "it has no turns"
        raise BadRow("no-assistant-turn", f"the conversation does not end with an assistant turn: {last}")
    return start


# --- labels


def label(row: Mapping[str, Any], column: str = "label") -> bool:
    found = value(row, column)
    key = found.translate(_THUMB_VARIANTS).strip().lower() if isinstance(found, str) else found
    if not isinstance(key, str | bool | int | float) or key not in LABELS:
        raise BadRow("label-not-bool", f'column "{column}" is {short(found)}; known are {_KNOWN_LABELS}')
    return LABELS[key]


# --- tools


def tool_calls(found: Any, name: str) -> list[Message]:
    """Calls as chat templates take them: {"type": "function", "function": {"name", "arguments"}}, with an object as
    arguments. JSON text is read; nulls inside are left out, since columns of Arrow are filled up with them.
    """
    found = parsed(found)
    calls = [found] if isinstance(found, Mapping) else found
    if not isinstance(calls, list | tuple) or not calls:
        raise BadRow("bad-tool-call", f"{name}: {short(found)} where a function call was looked for")
    return [_call(one, name) for one in calls]


def _call(found: Any, name: str) -> Message:
    inner = found.get("function", found) if isinstance(found, Mapping) else found
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise BadRow("bad-tool-call", f"{name}: a function call needs a name and arguments, and is {short(found)}")
    arguments = without_nulls(parsed(inner.get("arguments") or {}))
    call = {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}
    outer = {"id": found["id"]} if isinstance(found.get("id"), str) else {}
    return checked_unicode({**outer, **call}, f"a function call of {name}")


def tool_definitions(row: Mapping[str, Any], column: str = "tools") -> tuple[Message, ...]:
    """Definitions of functions as chat templates take them, from a list or its JSON text; none where it is empty."""
    found = row.get(column)
    if found is None or found == "" or found == []:
        return ()
    read = parsed(found)
    if not isinstance(read, list | tuple) or not all(isinstance(one, Mapping) for one in read):
        raise BadRow("bad-tools", f'column "{column}" is {short(found)}, not a list of definitions or its JSON text')
    plain = [without_nulls(one) for one in read]
    wrapped = [one if "function" in one else {"type": "function", "function": one} for one in plain]
    return tuple(checked_unicode(one, f'column "{column}"') for one in wrapped)


def parsed(found: Any) -> Any:
    """Text that is JSON as what it stands for, all else as it is."""
    if not isinstance(found, str):
        return found
    try:
        return json.loads(found)
    except (ValueError, RecursionError):
        return found


def without_nulls(found: Any) -> Any:
    if isinstance(found, Mapping):
        return {str(key): without_nulls(one) for key, one in found.items() if one is not None}
    if isinstance(found, list | tuple):
        return [without_nulls(one) for one in found]
    return found


def checked_unicode(found: dict[str, Any], name: str) -> dict[str, Any]:
    if not is_unicode(json.dumps(found, ensure_ascii=False, default=repr)):
        raise BadRow("not-unicode", f"{name} holds half a surrogate pair, which no tokenizer takes")
    return found
