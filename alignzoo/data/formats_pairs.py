"""Formats of preferences: chosen and rejected in several shapes, Anthropic's transcripts, graded comparisons."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from alignzoo.data.formats_plain import pair
from alignzoo.data.rows import BadRow, Dropped, Example, Messages
from alignzoo.data.values import column_text, conversation, short, turns, value

Row = Mapping[str, Any]
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
STRENGTH = "preference_strength"  # of a graded comparison, usable through data.keep
_STRONGEST = 3


def pairs(row: Row) -> Example:
    chosen, rejected = turns(row, "chosen"), turns(row, "rejected")
    prompt = turns(row, "prompt")
    whole = [side for side in (chosen, rejected) if not isinstance(side, str) and side and _begins_earlier(side)]
    if isinstance(prompt, str) and len(whole) == 2:  # a text prompt beside two whole conversations that hold it
        return pairs_implicit(row)
    return pair(prompt, chosen, rejected)


def _begins_earlier(messages: Messages) -> bool:
    return bool(messages[0]["role"] != "assistant")


def pairs_implicit(row: Row) -> Example:
    if isinstance(row.get("chosen"), str) or isinstance(row.get("rejected"), str):
        raise BadRow("no-prompt", 'chosen or rejected is text and there is no column "prompt"')
    return _parted(conversation(row, "chosen"), conversation(row, "rejected"))


def _parted(chosen: Messages, rejected: Messages) -> Example:
    """The shared beginning is the prompt, what follows on either side is its answer."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected) and shared:
        raise BadRow("chosen-equals-rejected")
    return pair(chosen[:shared], chosen[shared:], rejected[shared:])


# --- transcripts: "\n\nHuman: ... \n\nAssistant: ..."


def hh(row: Row) -> Example:
    return _parted(*(_transcript(column_text(row, side), f'column "{side}"') for side in ("chosen", "rejected")))


def hh_prompt(row: Row) -> Example:
    asked = _transcript(column_text(row, "prompt"), 'column "prompt"')
    if not asked or asked[-1] != {"role": "assistant", "content": ""}:
        raise BadRow("bad-transcript", 'column "prompt" does not end with "Assistant:"')
    return pair(asked[:-1], *(column_text(row, side).strip() for side in ("chosen", "rejected")))


def _transcript(found: str, name: str) -> Messages:
    before, *parts = _SPEAKER.split(found)
    if before.strip() or not parts:
        start = found.strip()[:40]
        raise BadRow("bad-transcript", f'{name} begins with {start!r}, not with "Human:" or "Assistant:"')
    said = zip(parts[::2], parts[1::2], strict=True)
    return tuple({"role": _SPEAKERS[speaker], "content": one.strip()} for speaker, one in said)


def looks_like_hh(row: Row) -> bool:
    sides = (row.get("chosen"), row.get("rejected"))
    return all(isinstance(side, str) and {"Human", "Assistant"} <= set(_SPEAKER.findall(side)) for side in sides)


def looks_like_hh_prompt(row: Row) -> bool:
    asked = row.get("prompt")
    return isinstance(asked, str) and _SPEAKER.match(asked) is not None and asked.rstrip().endswith("\n\nAssistant:")


# --- HelpSteer3: two answers and a grade from -3 (the first is much better) to 3 (the second is)


def helpsteer3(row: Row) -> Example:
    grade = _grade(row)
    first, second = column_text(row, "response1"), column_text(row, "response2")
    found = pair(turns(row, "context"), first, second)
    if not grade:
        raise Dropped("no-preference")
    return found if grade < 0 else pair(found.prompt, second, first)


def _grade(row: Row) -> int:
    found = value(row, "overall_preference")
    try:
        grade = float(found) if isinstance(found, int | float | str) and not isinstance(found, bool) else None
    except (ValueError, OverflowError):
        grade = None
    if grade is None or grade != grade or abs(grade) > _STRONGEST or grade != int(grade):
        raise BadRow(
            "bad-preference", f'column "overall_preference" is {short(found)}, not a whole number from -3 to 3'
        )
    return int(grade)


def strength(row: Row) -> Mapping[str, Any]:
    """The row with how strong its preference is, from 1 to 3."""
    return {**row, STRENGTH: abs(_grade(row))}
