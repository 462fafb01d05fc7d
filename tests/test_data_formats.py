"""Rows -> examples: formats, what is wrong with a row, columns of the recipe, kinds."""

from __future__ import annotations

from typing import Any

import pytest

from alignzoo.data import columns, formats
from alignzoo.data.kinds import converter
from alignzoo.data.rows import REASONS, BadRow, Dropped, Example
from alignzoo.errors import DataError


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def convert(row: dict[str, Any]) -> Example:
    return formats.detect(list(row), "auto", "file").convert(row)


U, A, B = user("hi"), assistant("good"), assistant("bad")
NULLS = {**A, "tool_calls": None, "name": None}


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "pairs", Example("pairs", "p", ("a", "b"))),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "pairs", Example("pairs", "", ("a", "b"))),
        ({"prompt": [U], "chosen": [A], "rejected": [B]}, "pairs", Example("pairs", (U,), ((A,), (B,)))),
        ({"prompt": [U], "chosen": "good", "rejected": "bad"}, "pairs", Example("pairs", (U,), ((A,), (B,)))),
        ({"prompt": "hi", "chosen": [A], "rejected": [B]}, "pairs", Example("pairs", (U,), ((A,), (B,)))),
        ({"prompt": "x", "chosen": [U, A], "rejected": [U, B]}, "pairs", Example("pairs", (U,), ((A,), (B,)))),
        ({"chosen": [U, A], "rejected": [U, B]}, "pairs_implicit", Example("pairs", (U,), ((A,), (B,)))),
        (
            {"chosen": [U, A, U, A], "rejected": [U, NULLS, U, B]},
            "pairs_implicit",
            Example("pairs", (U, A, U), ((A,), (B,))),
        ),
        ({"prompt": "p", "completion": "c"}, "prompt_completion", Example("demonstrations", "p", ("c",))),
        ({"prompt": [U], "completion": [A]}, "prompt_completion", Example("demonstrations", (U,), ((A,),))),
        ({"messages": [U, A]}, "messages", Example("demonstrations", (U,), ((A,),))),
        ({"messages": [U, A, U, A, B]}, "messages", Example("demonstrations", (U,), ((A, U, A, B),))),
        ({"messages": [A]}, "messages", Example("demonstrations", (), ((A,),))),
        ({"prompt": "p", "completion": "c", "label": True}, "labelled", Example("labelled", "p", ("c",), True)),
        ({"prompt": "p", "completion": "c", "label": "False"}, "labelled", Example("labelled", "p", ("c",), False)),
        ({"prompt": "p", "completion": "c", "label": 0}, "labelled", Example("labelled", "p", ("c",), False)),
        ({"messages": [U, A], "label": False}, "labelled_messages", Example("labelled", (U,), ((A,),), False)),
    ],
)
def test_formats(row: dict[str, Any], name: str, expected: Example) -> None:
    assert formats.detect([*row, "other"], "auto", "file").name == name
    assert convert(row) == expected


def test_the_shared_beginning_is_what_trl_takes() -> None:
    from trl.data_utils import extract_prompt

    row = {"chosen": [U, A, user("and?"), A], "rejected": [U, A, user("and?"), B]}
    theirs, ours = extract_prompt(row), convert(row)
    assert list(ours.prompt) == theirs["prompt"]
    assert [list(c) for c in ours.completions] == [theirs["chosen"], theirs["rejected"]]


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**PAIR, "chosen": None}, "missing-column"),
        ({**PAIR, "chosen": ""}, "empty-completion"),
        ({**PAIR, "chosen": " \n"}, "empty-completion"),
        ({**PAIR, "rejected": "a"}, "chosen-equals-rejected"),
        ({**PAIR, "prompt": 3}, "not-text"),
        ({**PAIR, "chosen": {"role": "assistant"}}, "not-text"),
        ({**PAIR, "chosen": "\ud800"}, "not-unicode"),
        ({**PAIR, "chosen": []}, "empty-completion"),
        ({**PAIR, "chosen": ["text"]}, "not-text"),
        ({**PAIR, "chosen": [assistant(3)]}, "not-text"),
        ({**PAIR, "chosen": [assistant(None)]}, "not-text"),
        ({**PAIR, "chosen": [{"content": "x"}]}, "unknown-role"),
        ({**PAIR, "chosen": [{"role": "human", "content": "x"}]}, "unknown-role"),
        ({**PAIR, "chosen": [{"role": [], "content": "x"}]}, "unknown-role"),
        ({**PAIR, "chosen": [A, U]}, "not-assistant"),
        ({**PAIR, "chosen": [A], "rejected": "good"}, "chosen-equals-rejected"),
        ({"chosen": "a", "rejected": "b"}, "no-prompt"),
        ({"chosen": [U, A], "rejected": [U, A]}, "chosen-equals-rejected"),
        ({"chosen": [U, A], "rejected": [U]}, "empty-completion"),
        ({"chosen": [U, A, U, A], "rejected": [U, B, U, A]}, "not-assistant"),
        ({"chosen": [], "rejected": []}, "empty-completion"),
        ({"messages": [U]}, "no-assistant-turn"),
        ({"messages": [U, A, U]}, "no-assistant-turn"),
        ({"messages": []}, "no-assistant-turn"),
        ({"messages": [U, assistant(" ")]}, "empty-completion"),
        ({"messages": "text"}, "not-text"),
        ({"messages": [U, A], "label": "perhaps"}, "label-not-bool"),
        ({"messages": [U, A], "label": 2}, "label-not-bool"),
        ({"messages": [U, A], "label": []}, "label-not-bool"),
        ({"messages": [U, A], "label": float("nan")}, "label-not-bool"),
    ],
)
def test_wrong_rows_have_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as problem:
        convert(row)
    assert problem.value.reason == reason
    assert reason in REASONS
    assert problem.value.text


def test_a_tool_call_is_no_empty_completion() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    function = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert convert({"messages": [U, call]}).completions == (({**call, "content": "", "tool_calls": [function]},),)


def test_unknown_columns_name_the_formats_and_suggest_a_mapping() -> None:
    with pytest.raises(DataError) as error:
        formats.detect(["task", "Winner", "loser"], "auto", "gsm.jsonl")
    text = str(error.value)
    assert "gsm.jsonl" in text
    assert "task, Winner, loser" in text
    assert all(known.name in text for known in formats.FORMATS)
    assert 'data.columns = {prompt = "task", chosen = "Winner", rejected = "loser"}' in text


def test_near_column_names_are_suggested() -> None:
    with pytest.raises(DataError, match=r'data\.columns = \{chosen = "chosn", rejected = "rejectd"\}'):
        formats.detect(["prompt", "chosn", "rejectd"], "auto", "file")
    with pytest.raises(DataError, match="for example"):
        formats.detect(["zzz"], "auto", "file")


def test_a_named_format() -> None:
    assert formats.detect(["prompt", "completion", "label"], "prompt_completion", "f").name == "prompt_completion"
    with pytest.raises(DataError, match=r'unknown format "pair".*"pairs"'):
        formats.detect(["prompt"], "pair", "f")
    with pytest.raises(DataError, match=r"(?s)missing: chosen.*prompt, rejected"):
        formats.detect(["prompt", "rejected"], "pairs", "f")


def test_renaming() -> None:
    row = {"a": 1, "b": 2, "c": 3}
    assert columns.rename(row, {"prompt": "a"}) == {"b": 2, "c": 3, "prompt": 1}
    assert columns.rename(row, {"a": "b", "b": "a"}) == {"a": 2, "b": 1, "c": 3}
    columns.check_mapping(["a"], {"prompt": "a"}, "f")
    with pytest.raises(DataError, match=r'no column "question".*"questions"'):
        columns.check_mapping(["questions"], {"prompt": "question"}, "f")


def test_kept_columns() -> None:
    row = {"a": True, "b": 3, "c": "0.5", "d": -1.5}
    assert columns.numbers(row, "abcd") == {"a": 1.0, "b": 3.0, "c": 0.5, "d": -1.5}
    for wrong in ("x", "", float("nan"), float("inf"), 10**400, 1e300, [], {}):
        with pytest.raises(BadRow, match="keep-not-a-number"):
            columns.numbers({"a": wrong}, ["a"])
    with pytest.raises(BadRow, match="missing-column"):
        columns.numbers({"a": None}, ["a"])
    with pytest.raises(DataError, match=r'no such column.*"score"'):
        columns.check_keep(["score"], ["scores"], "f")


def test_conversions() -> None:
    pair = Example("pairs", "p", ("a", "b"), extra={"x": 1.0}, where="f:1")
    chosen, words = converter("pairs", "demonstrations", "f")
    assert chosen(pair) == (Example("demonstrations", "p", ("a",), extra={"x": 1.0}, where="f:1"),)
    assert words
    both, _ = converter("pairs", "labelled", "f")
    assert [(e.kind, e.completions, e.label) for e in both(pair)] == [
        ("labelled", ("a",), True),
        ("labelled", ("b",), False),
    ]
    desirable, words = converter("labelled", "demonstrations", "f")
    assert desirable(Example("labelled", "p", ("a",), True)) == (Example("demonstrations", "p", ("a",)),)
    with pytest.raises(Dropped, match="undesirable"):
        desirable(Example("labelled", "p", ("a",), False))
    assert "dropped" in words
    same, words = converter("pairs", "pairs", "f")
    assert (same(pair), words) == ((pair,), "")


@pytest.mark.parametrize(
    ("held", "wanted"),
    [("demonstrations", "pairs"), ("labelled", "pairs"), ("demonstrations", "labelled"), ("pairs", "groups")],
)
def test_impossible_conversions(held: str, wanted: str) -> None:
    with pytest.raises(DataError, match=rf"(?s)f: holds {held}, and the loss wants {wanted}.*way out"):
        converter(held, wanted, "f")
