"""Tools for chat templates that know none: definitions, calls and results as text, in tags that many models know."""

from __future__ import annotations

import json
from collections.abc import Sequence

from alignzoo.data.rows import Message, Messages

_INTRODUCTION = (
    "You can call these functions, one JSON object a line:\n<tools>\n{definitions}\n</tools>\n"
    'To call one, write <tool_call>{{"name": its name, "arguments": an object}}</tool_call>.'
)


def has_calls(turns: Messages) -> bool:
    return any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns)


def with_json_arguments(turns: Messages) -> Messages:
    """The turns with the arguments of calls as JSON text, as some templates join them."""
    return tuple(
        {**turn, "tool_calls": [_json_arguments(call) for call in turn["tool_calls"]]}
        if turn.get("tool_calls")
        else turn
        for turn in turns
    )


def _json_arguments(call: Message) -> Message:
    function = call["function"]
    return {**call, "function": {**function, "arguments": _json(function["arguments"])}}


def introduced(prompt: Messages, tools: Sequence[Message]) -> Messages:
    """The prompt with the definitions at the end of its system turn."""
    if not tools:
        return prompt
    text = _INTRODUCTION.format(definitions="\n".join(_json(tool.get("function", tool)) for tool in tools))
    if prompt and prompt[0]["role"] in ("system", "developer"):
        return ({**prompt[0], "content": f"{prompt[0]['content']}\n\n{text}".strip()}, *prompt[1:])
    return ({"role": "system", "content": text}, *prompt)


def as_text(turns: Messages) -> Messages:
    """The turns with calls in the assistant's text, and the results that follow each other as one turn of the user."""
    written: list[Message] = []
    for i, turn in enumerate(turns):
        if turn["role"] != "tool":
            written.append(_with_calls(turn))
            continue
        result = f"<tool_response>\n{turn['content']}\n</tool_response>"
        if i and turns[i - 1]["role"] == "tool":
            written[-1] = {"role": "user", "content": f"{written[-1]['content']}\n{result}"}
        else:
            written.append({"role": "user", "content": result})
    return tuple(written)


def _with_calls(turn: Message) -> Message:
    calls = turn.get("tool_calls")
    if not calls:
        return turn
    texts = [f"<tool_call>\n{_json(call.get('function', call))}\n</tool_call>" for call in calls]
    kept = {key: value for key, value in turn.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join([*([turn["content"]] if turn["content"] else []), *texts])}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
