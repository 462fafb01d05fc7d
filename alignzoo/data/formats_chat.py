"""Formats of whole conversations: messages with role and content, ShareGPT turns with from and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignzoo.data.formats_plain import pair
from alignzoo.data.rows import Example, Messages
from alignzoo.data.values import as_messages, begin_of_last_answer, completion, conversation, text, value
from alignzoo.data.values import messages as read_messages

Row = Mapping[str, Any]


def messages(row: Row) -> Example:
    return _all_answers(conversation(row, "messages"))


def messages_answer(row: Row) -> Example:
    return _last_answer(conversation(row, "messages"))


def sharegpt(row: Row) -> Example:
    return _all_answers(conversation(row, "conversations"))


def sharegpt_answer(row: Row) -> Example:
    return _last_answer(conversation(row, "conversations"))


def sharegpt_pairs(row: Row) -> Example:
    return pair(conversation(row, "conversations"), _side(row, "chosen"), _side(row, "rejected"))


def _side(row: Row, column: str) -> Messages:
    """One more turn, a list of them, or its text."""
    found, name = value(row, column), f'column "{column}"'
    if isinstance(found, str):
        return as_messages(text(found, name), "assistant")
    return read_messages(found if isinstance(found, list | tuple) else [found], name)


def _all_answers(turns: Messages) -> Example:
    """From the first assistant turn on all belongs to the completion, of which the assistant's turns are learned."""
    completion(turns[begin_of_last_answer(turns) :], "the assistant's last turn")
    start = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    return Example("demonstrations", turns[:start], (turns[start:],))


def _last_answer(turns: Messages) -> Example:
    """The assistant turns at the end are the completion, all before them is the prompt."""
    start = begin_of_last_answer(turns)
    return Example("demonstrations", turns[:start], (completion(turns[start:], "the assistant's last turn"),))
