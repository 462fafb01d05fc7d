"""Formats with one text or conversation a column: prompt and completion, Alpaca, plain text, prompts alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from alignzoo.data.columns import FLOAT32_MAX
from alignzoo.data.rows import BadRow, Example, Messages, Turns, describe
from alignzoo.data.values import (
    as_messages,
    column_text,
    completion,
    label,
    optional_text,
    same_shape,
    says_something,
    short,
    text,
    turns,
    value,
)

Row = Mapping[str, Any]


def prompt_completion(row: Row) -> Example:
    answer = completion(turns(row, "completion"), "completion")
    prompt, completions = same_shape(turns(row, "prompt"), [answer])
    return Example("demonstrations", prompt, completions)


def labelled(make: Callable[[Row], Example]) -> Callable[[Row], Example]:
    """The examples of another format with the label of their row, which is that of the last answer."""

    def convert(row: Row) -> Example:
        return replace(make(row), kind="labelled", label=label(row))

    return convert


# --- Alpaca


def alpaca(row: Row) -> Example:
    answer = completion(column_text(row, "output"), 'column "output"')
    earlier = _history(row)
    if not earlier:
        return Example("demonstrations", _instruction(row), (answer,))
    whole = (*earlier, *as_messages(_instruction(row), "user"), *as_messages(answer, "assistant"))
    return Example("demonstrations", whole[:1], (whole[1:],))


def alpaca_answer(row: Row) -> Example:
    """The last answer alone, after the history: what a label is for."""
    answer = completion(column_text(row, "output"), 'column "output"')
    prompt, completions = same_shape(_asked(row), [answer])
    return Example("demonstrations", prompt, completions)


def alpaca_pairs(row: Row) -> Example:
    return pair(_asked(row), turns(row, "chosen"), turns(row, "rejected"))


def _asked(row: Row) -> Turns:
    earlier = _history(row)
    return (*earlier, *as_messages(_instruction(row), "user")) if earlier else _instruction(row)


def _instruction(row: Row) -> str:
    """The instruction and, on the next line, the input: the user's turn as LLaMA-Factory has it."""
    parts = [part for column in ("instruction", "input") if (part := optional_text(row, column))]
    if not "".join(parts).strip():
        raise BadRow("no-prompt", "instruction and input are empty")
    return "\n".join(parts)


def _history(row: Row) -> Messages:
    """Earlier turns, from a list of [question, answer]."""
    found = row.get("history")
    if found is None or found == "":
        return ()
    if not isinstance(found, list | tuple) or not all(isinstance(one, list | tuple) and len(one) == 2 for one in found):
        raise BadRow("not-text", 'column "history" is not a list of [question, answer]')
    roles = ("user", "assistant")
    said = [(role, one) for round_ in found for role, one in zip(roles, round_, strict=True)]
    return tuple({"role": role, "content": text(one, 'column "history"')} for role, one in said)


def pair(prompt: Turns, chosen: Turns, rejected: Turns) -> Example:
    """A pair of two answers. Raises BadRow where one is empty or both are the same."""
    sides = (completion(chosen, "chosen"), completion(rejected, "rejected"))
    prompt, completions = same_shape(prompt, sides)
    if completions[0] == completions[1]:
        raise BadRow("chosen-equals-rejected")
    return Example("pairs", prompt, completions)


# --- groups


def groups(row: Row) -> Example:
    """A prompt with any number of answers, and a reward for each of them or null."""
    answers, rewards = _listed(row, "completions"), _listed(row, "rewards")
    if not answers:
        raise BadRow("empty-completion", 'column "completions" is empty')
    if len(rewards) != len(answers):
        raise BadRow("bad-rewards", f"{len(answers)} completions and {len(rewards)} rewards")
    named = {f"completions[{i}]": one for i, one in enumerate(answers)}
    prompt, completions = same_shape(turns(row, "prompt"), [completion(turns(named, name), name) for name in named])
    return Example("groups", prompt, completions, rewards=tuple(map(_reward, rewards)))


def _listed(row: Row, column: str) -> Sequence[object]:
    found = value(row, column)
    if not isinstance(found, list | tuple):
        raise BadRow("bad-rewards", f'column "{column}" is {describe(found)}, not a list')
    return found


def _reward(found: object) -> float:
    if found is None:
        return math.nan
    if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) <= FLOAT32_MAX:
        raise BadRow("bad-rewards", f'column "rewards" holds {short(found)}, which is neither a number nor null')
    return float(found)


# --- text and prompts


def plain_text(row: Row) -> Example:
    """Text to go on learning from. Nothing stands before it but the BOS, where the tokenizer has one."""
    found = column_text(row, "text")
    if not says_something(found):
        raise BadRow("empty-completion", 'column "text" is empty')
    return Example("demonstrations", "", (found,), raw=True)


def prompts(row: Row) -> Example:
    """A prompt alone."""
    value(row, "prompt")
    asked = turns(row, "prompt")
    if not says_something(asked):
        raise BadRow("no-prompt", 'column "prompt" is empty')
    return Example("prompts", asked, ())
