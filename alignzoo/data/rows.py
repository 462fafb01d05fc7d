"""What passes between the stages: a row of a file, an example, what is wrong with a row, and the counts."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alignzoo.errors import DataError

Message = Mapping[str, Any]
Messages = tuple[Message, ...]
Turns = str | Messages

SHOWN = 5  # bad rows that an error names

REASONS = {  # reason: in words. Bad rows, then what does not fit, then what is cut
    "invalid-json": "not valid JSON",
    "invalid-utf8": "not UTF-8 text",
    "field-count": "more or fewer fields than the header",
    "not-an-object": "not an object with columns",
    "missing-column": "a column is missing or null",
    "not-text": "a column is neither text nor a list of messages",
    "not-unicode": "text with half a surrogate pair",
    "too-nested": "lists and objects inside of each other without end",
    "no-prompt": "no prompt",
    "unknown-role": "a message has an unknown role",
    "no-assistant-turn": "the conversation does not end with an assistant turn",
    "not-assistant": "the completion holds a turn that is not the assistant's",
    "bad-transcript": "the text is no transcript of Human: and Assistant: turns",
    "media": "the text stands beside images, video or audio, and only text is read",
    "bad-tools": "the definitions of tools cannot be read",
    "bad-tool-call": "a function call cannot be read",
    "empty-completion": "a completion is empty",
    "chosen-equals-rejected": "chosen equals rejected",
    "label-not-bool": "the label is neither true nor false",
    "bad-rewards": "the rewards are not a number or null for each completion",
    "bad-preference": "the preference is not a whole number from -3 to 3",
    "keep-not-a-number": "a column of data.keep is not a number",
    "refused": "the format of a plugin refuses the row",
    "format-failed": "the code of a plugin's format failed",
    "template-error": "the chat template refused the conversation",
    "prompt-not-prefix": "the chat template writes the prompt in another way when a completion follows",
    "turn-rewritten": "the chat template writes an assistant turn in another way when later turns follow",
    "no-context": "nothing stands before the first token to be learned",
    "no-preference": "neither answer is preferred",
    "left-out": "left out by the format of a plugin",
    "undesirable": "labelled undesirable, so nothing to imitate",
    "too-long": "prompt and completion are longer than data.max_length",
    "prompt-too-long": "the prompt is longer than data.max_prompt_length",
    "completion-too-long": "a completion is longer than data.max_completion_length",
    "no-room-for-prompt": "the completion alone fills data.max_length",
    "no-room-for-completion": "the prompt alone fills data.max_length",
    "equal-after-cut": "cut to data's limits, chosen equals rejected",
    "weight": "left out by the source's weight",
    "prompt-left": "prompt cut at its start",
    "completion-right": "completion cut at its end",
    "mismatched-right": "mismatched completion cut at its end to fit data.max_length after this prompt",
}

NOTES = {  # note: in words; what is worth knowing of rows that are used
    "every-turn": "several assistant turns, all of them learned (data.train_on = every)",
    "last-turn": "several assistant turns, only the last of them learned (data.train_on = last)",
    "placeholder": "warning: placeholders that nobody has filled in",
    "tools-as-text": "the chat template knows no tools: their definitions are text in the system turn",
    "calls-as-text": "the chat template knows no function calls: they and their results are text in the turns",
    "system-merged": "the chat template takes no system turn: its text goes before the first user turn",
    "developer-as-system": "the chat template knows no developer turn: it is written as a system turn",
    "other-end": "warning: the chat template ends an assistant turn in another way where others follow; not learned",
    "text-changed": "warning: the chat template leaves out or rewrites some of the text",
    "no-eos": "warning: the tokenizer has no EOS token, so nothing marks the end of the text",
}


class BadRow(Exception):
    """A row that cannot be used. `reason` is a key of REASONS, `text` says what is wrong with this row."""

    def __init__(self, reason: str, text: str = "") -> None:
        super().__init__(reason)
        self.reason, self.text = reason, text or REASONS[reason]

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, str]]:
        return type(self), (self.reason, self.text)


class Dropped(Exception):
    """A row in order that is left out all the same; the reason is a key of REASONS."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source. `problem` is set where it could not even be read."""

    where: str  # "file:line" or "file row N", from 1
    values: Mapping[str, Any]
    problem: BadRow | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One row in alignzoo's terms. Prompt and completions are all text, or all messages.

    A completion of messages begins with the assistant. Where it goes on with other turns, the assistant's are learned.
    """

    kind: str  # demonstrations, pairs, labelled, groups or prompts
    prompt: Turns
    completions: tuple[Turns, ...]  # pairs: (chosen, rejected); prompts: none
    label: bool | None = None  # labelled
    rewards: tuple[float, ...] | None = None  # groups, one for each completion; NaN where there is none
    extra: Mapping[str, float] = field(default_factory=dict)  # the columns of data.keep
    where: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()  # definitions of functions, for the chat template
    raw: bool = False  # text to continue, never put through a chat template
    columns: Mapping[str, Any] = field(default_factory=dict)  # prompts: the other columns of the row
    notes: tuple[str, ...] = ()  # keys of NOTES, with ": detail" where there is one
    weight_key: int = 0  # of its row: what decides whether a fractional weight takes it


@dataclass
class Tally:
    """What happened to the rows of one source."""

    read: int = 0
    examples: int = 0  # after conversion to the kind that the loss wants
    kept: int = 0  # examples that became token trees
    unseen: int = 0  # examples that were not tokenised, since bad rows stop the run anyway
    counted: int = 0  # the same under the source's weight
    bad: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)  # keys of NOTES, and what warnings are made of
    shown: list[str] = field(default_factory=list)  # the first bad rows, in words

    def add_bad(self, where: str, problem: BadRow) -> None:
        self.bad[problem.reason] += 1
        if len(self.shown) < SHOWN:
            text = problem.text.encode("utf-8", "backslashreplace").decode()  # a row may hold what no terminal prints
            self.shown.append(f"{where}: {text} [{problem.reason}]")


def note_lines(notes: Mapping[str, int]) -> tuple[str, ...]:
    """Notes in words with their counts; the details of one note share a line."""
    lines: dict[str, list[str]] = {}
    for note, count in notes.items():
        key, _, detail = note.partition(": ")
        if key in NOTES:
            lines.setdefault(key, []).append(f"{detail} in {count} rows" if detail else f"in {count} rows")
    return tuple(f"{NOTES[key]}: {_enumerated(found)}" for key, found in lines.items())


def _enumerated(found: list[str], most: int = 5) -> str:
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def bad_rows_error(tallies: list[Tally]) -> DataError:
    """The error of on_bad_row = "fail": the first bad rows and how many there are of each kind."""
    counts: Counter[str] = sum((t.bad for t in tallies), Counter())
    shown = [line for t in tallies for line in t.shown][:SHOWN]
    total, read, unseen = counts.total(), sum(t.read for t in tallies), sum(t.unseen for t in tallies)
    more = [f"... and {total - len(shown)} more"] if total > len(shown) else []
    more += [f"({unseen} examples were not tokenised after that: there may be more)"] if unseen else []
    return DataError(
        "\n    ".join([f"{total} of {read} rows cannot be used:", *shown, *more]),
        why="; ".join(f"{n} x {reason}: {REASONS[reason]}" for reason, n in counts.most_common()),
        fix='mend them, or set data.on_bad_row = "skip" to leave them out and count them',
    )


def content_hash(*parts: Any, salt: str = "") -> bytes:
    """sha256 of plain values, independent of the order of keys. Different salts give independent choices."""
    try:
        text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=repr)
    except (TypeError, ValueError, RecursionError):  # keys of several types, cycles, deep nesting: live objects only
        text = repr(parts)
    return hashlib.sha256(salt.encode() + b"\0" + text.encode("utf-8", "surrogatepass")).digest()


def describe(value: Any) -> str:
    """The type of a JSON value in words."""
    if value is None:
        return "null"
    words = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return words.get(type(value), f"a {type(value).__name__}")
