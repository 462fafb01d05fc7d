"""Formats of rows: which columns make which kind of data. A new format is one function and one entry of FORMATS.

A format's function takes a row with our column names, gives an Example, and raises BadRow or Dropped. Where the recipe
names no format, the one of which most columns are there is taken: by our names before other names, and the first of
FORMATS where two are alike. FORMATS comes in by the hook that strangers' formats come in by (formats_found.py); those
are never taken unless the recipe names them, so that what is installed does not change what a file is read as.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from alignzoo.api import Format
from alignzoo.data import formats_chat as chat
from alignzoo.data import formats_pairs as preferences
from alignzoo.data import formats_plain as plain
from alignzoo.data.columns import listed
from alignzoo.data.rows import Example
from alignzoo.data.values import as_messages, optional_text, tool_definitions
from alignzoo.errors import DataError
from alignzoo.hookspecs import hookimpl
from alignzoo.schema import nearest

_PROMPT = ("question", "query", "problem", "input")
_COMPLETION = ("response", "answer", "output", "solution", "target")
_LABEL = ("kto_tag", "is_good", "is_desirable", "desirable", "thumbs_up", "thumbs")
_CHOSEN = ("chosen_response", "preferred", "accepted")
_REJECTED = ("rejected_response", "dispreferred")
ALIASES: dict[str, tuple[str, ...]] = {  # what other people call our columns; taken in this order, and said
    "prompt": _PROMPT, "completion": _COMPLETION, "label": _LABEL, "chosen": _CHOSEN, "rejected": _REJECTED,
    "output": ("response",), "messages": ("conversation", "dialogue"),
}  # fmt: skip
_OTHER_NAMES = {  # further names: for suggestions only, nothing is mapped by them
    "prompt": ("instruction", "context", "task"),
    "chosen": ("winner", "good", "better", "positive", "best"),
    "rejected": ("loser", "bad", "worse", "negative", "worst"),
    "messages": ("turns", "chat"),
    "label": ("labels", "feedback", "rating"),
    "text": ("document", "content"),
}


def convert(known: Format, row: Mapping[str, Any]) -> Example:
    """A row with our column names as an example. Raises BadRow, and Dropped for one that is left out."""
    example: Example = known.make(row)
    for column, add in _BESIDE.items():
        if column in known.optional:
            example = add(example, row)
    return example


def _with_system(example: Example, row: Mapping[str, Any]) -> Example:
    """The column "system" before a conversation that has no system turn."""
    system = optional_text(row, "system")
    prompt = as_messages(example.prompt, "user")
    if not system or (prompt and prompt[0]["role"] in ("system", "developer")):
        return example
    completions = tuple(as_messages(completion, "assistant") for completion in example.completions)
    return replace(example, prompt=({"role": "system", "content": system}, *prompt), completions=completions)


def _with_tools(example: Example, row: Mapping[str, Any]) -> Example:
    tools = tool_definitions(row)
    if not tools:
        return example
    completions = tuple(as_messages(completion, "assistant") for completion in example.completions)
    return replace(example, prompt=as_messages(example.prompt, "user"), completions=completions, tools=tools)


_BESIDE = {"system": _with_system, "tools": _with_tools}
_CHAT = ("system", "tools")
_ALPACA = ("input", "system", "history")

FORMATS = (
    Format(
        "labelled", "labelled", ("prompt", "completion", "label"),
        "prompt and completion as text or message lists; label true (desirable) or false",
        plain.labelled(plain.prompt_completion), _CHAT,
    ),
    Format(
        "labelled_alpaca", "labelled", ("instruction", "output", "label"),
        "instruction and, on the next line, input; output; label as above",
        plain.labelled(plain.alpaca_answer), _ALPACA,
    ),
    Format(
        "labelled_messages", "labelled", ("messages", "label"),
        "a conversation; label true or false is that of the assistant turn(s) at its end",
        plain.labelled(chat.messages_answer), _CHAT,
    ),
    Format(
        "labelled_sharegpt", "labelled", ("conversations", "label"),
        "a conversation of from and value; label as above", plain.labelled(chat.sharegpt_answer), _CHAT,
    ),
    Format(
        "helpsteer3", "pairs", ("context", "response1", "response2", "overall_preference"),
        "a conversation, two answers, and a grade from -3 (the first is much better) to 3 (the second is); 0 is "
        "dropped, its size is `preference_strength` for data.keep",
        preferences.helpsteer3, derived=preferences.strength, adds=(preferences.STRENGTH,),
    ),
    Format(
        "hh_prompt", "pairs", ("prompt", "chosen", "rejected"),
        'prompt as a transcript that ends with "Assistant:", two answers as text',
        preferences.hh_prompt, ("system",), preferences.looks_like_hh_prompt,
    ),
    Format(
        "pairs", "pairs", ("prompt", "chosen", "rejected"),
        "prompt, chosen and rejected as text or message lists", preferences.pairs, _CHAT,
    ),
    Format(
        "alpaca_pairs", "pairs", ("instruction", "chosen", "rejected"),
        "instruction and, on the next line, input; two answers", plain.alpaca_pairs, _ALPACA,
    ),
    Format(
        "sharegpt_pairs", "pairs", ("conversations", "chosen", "rejected"),
        "a conversation of from and value; chosen and rejected as one more turn each", chat.sharegpt_pairs, _CHAT,
    ),
    Format(
        "hh", "pairs", ("chosen", "rejected"),
        'two transcripts of "Human:" and "Assistant:" as text; the beginning that they share is the prompt',
        preferences.hh, ("system",), preferences.looks_like_hh,
    ),
    Format(
        "pairs_implicit", "pairs", ("chosen", "rejected"),
        "two conversations as message lists; the beginning that they share is the prompt",
        preferences.pairs_implicit, _CHAT,
    ),
    Format(
        "groups", "groups", ("prompt", "completions", "rewards"),
        "a prompt, a list of answers, and a list with the reward of each: a number, or null for none",
        plain.groups, _CHAT,
    ),
    Format(
        "alpaca", "demonstrations", ("instruction", "output"),
        "instruction and, on the next line, input; output", plain.alpaca, _ALPACA,
    ),
    Format(
        "prompt_completion", "demonstrations", ("prompt", "completion"),
        "prompt and completion as text or message lists", plain.prompt_completion, _CHAT,
    ),
    Format(
        "messages", "demonstrations", ("messages",),
        "a conversation; its assistant turns are learned, all of them or the last (`data.train_on`)",
        chat.messages, _CHAT,
    ),
    Format(
        "sharegpt", "demonstrations", ("conversations",),
        "a conversation of from (human, gpt, system, function_call, observation) and value; learned as above",
        chat.sharegpt, _CHAT,
    ),
    Format(
        "text", "demonstrations", ("text",),
        "text to go on learning from, without a chat template; its first token is context", plain.plain_text,
    ),
    Format(
        "prompts", "prompts", ("prompt",),
        "prompts alone, as text or message lists; other columns stay beside them", plain.prompts, _CHAT,
    ),
)  # fmt: skip


@hookimpl
def alignzoo_formats() -> list[Format]:
    return list(FORMATS)


# --- finding the format


@dataclass(frozen=True)
class Match:
    """The format of a source, and which of its columns go by another name: ours -> the file's."""

    format: Format
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.format.name

    @property
    def known(self) -> tuple[str, ...]:
        """The columns that are read, under the file's names."""
        return (*self.format.columns, *self.format.optional, *self.aliases.values())

    def convert(self, row: Mapping[str, Any]) -> Example:
        return convert(self.format, self.named(row))

    def named(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row with our names beside the file's."""
        if not self.aliases:
            return row
        return {**row, **{ours: row[theirs] for ours, theirs in self.aliases.items() if theirs in row}}


def detect(found: Sequence[str], name: str | Format, source: str, rows: Iterable[Mapping[str, Any]] = ()) -> Match:
    """The format of rows with these columns. name: "auto", or the one that the recipe names. Raises DataError.

    rows: the first of them, for formats that only differ in what stands in their columns.
    """
    if name != "auto":
        return _named(found, name if isinstance(name, Format) else _by_name(name, source), source)
    rows = list(rows)
    matches = [match for known in FORMATS if (match := _match(known, found)) and _looks(match, rows)]
    if matches:
        best = max(matches, key=lambda match: (len(match.format.columns), -len(match.aliases)))
        if best.format.kind != "prompts" or not _nearly(found):
            return best
    raise DataError(
        f"{source}: no known format has the columns {listed(found)}",
        why="known are " + "; ".join(f"{f.name} ({', '.join(f.columns)})" for f in FORMATS),
        fix=_suggest(FORMATS, found),
    )


def _match(known: Format, found: Sequence[str]) -> Match | None:
    """How the columns fill a format; None where one is missing."""
    lowered = {name.lower(): name for name in reversed(found)}
    aliases: dict[str, str] = {}
    for column in known.columns:
        if column not in found:
            theirs = next((lowered[other] for other in (column, *ALIASES.get(column, ())) if other in lowered), None)
            if theirs is None or theirs in (*known.columns, *known.optional, *aliases.values()):
                return None
            aliases[column] = theirs
    return Match(known, aliases)


def _looks(match: Match, rows: Sequence[Mapping[str, Any]]) -> bool:
    looks = match.format.looks
    return looks is None or any(looks(match.named(row)) for row in rows)


def _nearly(found: Sequence[str]) -> bool:
    """Whether the columns beside a prompt look like a misspelt answer."""
    richer = [known for known in FORMATS if "prompt" in known.columns and known.kind != "prompts"]
    return any(all(_guess(column, found) for column in known.columns) for known in richer)


def _by_name(name: str, source: str) -> Format:
    by_name = {known.name: known for known in FORMATS}
    if name not in by_name:
        raise DataError(
            f'{source}: unknown format "{name}"{nearest(name, by_name)}', why=f"known are {', '.join(by_name)}"
        )
    return by_name[name]


def _named(found: Sequence[str], known: Format, source: str) -> Match:
    match = _match(known, found)
    if match is not None:
        return match
    missing = [column for column in known.columns if column not in found]
    raise DataError(
        f'{source}: format "{known.name}" needs {", ".join(known.columns)}; missing: {", ".join(missing)}',
        why=f"columns found: {listed(found)}",
        fix=_suggest([known], found),
    )


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
    pairs = ", ".join(f"{ours} = {json.dumps(theirs, ensure_ascii=False)}" for ours, theirs in best.items())
    return f"map columns if these are meant: data.columns = {{{pairs}}}"


def _guess(column: str, found: Sequence[str]) -> str:
    if column in found:
        return column
    lowered = {name.lower(): name for name in reversed(found)}
    for other in (*ALIASES.get(column, ()), *_OTHER_NAMES.get(column, ())):
        if other in lowered:
            return lowered[other]
    close = difflib.get_close_matches(column, lowered, n=1, cutoff=0.75)
    return lowered[close[0]] if close else ""
